"""Opening a model whose every weight is in its files: no random initialization, no copy of the file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from nemo_mtbi.io.tensors import read_tensors

FROZEN_PARTS = ("llm.", "embed_tokens.", "perception.encoder.")  # large, and plain parameters


def _tie_only(model: PreTrainedModel) -> None:
    model.tie_weights(recompute_mapping=False)


@contextmanager
def without_initialization() -> Iterator[None]:
    """Modules built in here have parameters of no particular value; tied ones are tied."""
    with no_init_weights():  # which also leaves out that Transformers ties, and restores init_weights
        PreTrainedModel.init_weights = _tie_only  # type: ignore[method-assign]
        yield


def fill(model: Any, files: Mapping[str, Path]) -> None:
    """Give a model the tensors of safetensors files (by name); names that the model lacks are left out.

    Parameters of the large parts lie in the mapped files, which is read where and when it is used; writing to them
    changes the process's own copy of a page, not a file. The rest goes through ``load_state_dict`` and its hooks.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rest = {}
    for name, tensor in read_tensors(files):
        parameter = parameters.get(name)
        if parameter is not None and name.startswith(FROZEN_PARTS) and tensor.shape == parameter.shape:
            parameter.data = tensor.to(parameter.dtype)
        else:
            rest[name] = tensor
    model.load_state_dict(rest, strict=False)
