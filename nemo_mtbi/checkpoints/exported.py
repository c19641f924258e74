"""Reads what :mod:`nemo_mtbi.checkpoints.archive` wrote: every check before a model is built; imports no NeMo."""

import errno
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.io.tensors import INDEX, SINGLE, weight_files
from nemo_mtbi.modules.causal_lm import causal_lm

CONFIG, NEMO_CONFIG = "config.json", "model_config.yaml"
LLM_BACKBONE_DIR = "llm_backbone"  # NeMo's name (speechlm2/parts/hf_hub.py)
# Where the parts of a model may come from. Whole models are none: those read further files, some of which hold code.
PARTS_OF = (
    "nemo_mtbi.modules.",
    "nemo.collections.speechlm2.modules.perception.",
    *(
        f"nemo.collections.asr.modules.{name}."
        for name in ("audio_preprocessing", "conformer_encoder", "squeezeformer_encoder", "conv_asr", "rnn_encoder")
    ),
    "torch.nn.modules.",
)
PACKAGES = ("nemo_mtbi.", "nemo.", "torch.nn.")  # of which nothing else is imported
OF_HYDRA = ("_args_", "_convert_", "_partial_", "_recursive_")


def export_folder(path: Path) -> AbstractContextManager[Path]:
    """An export as a folder: itself, or what its ``.nemo`` file holds (mapped files stay readable afterwards).

    Raises:
        CheckpointError: see :func:`unpacked_nemo`.
    """
    return nullcontext(path) if path.is_dir() else unpacked_nemo(path)


def local_config(folder: Path) -> dict[str, Any]:
    """The configuration of an export, with the places of its own tokenizer and LLM configuration."""
    cfg: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return cfg | {
        "llm_config_path": str(folder / LLM_BACKBONE_DIR),
        "tokenizer_path": str(folder),
        "pretrained_weights": False,
    }


@contextmanager
def unpacked_nemo(path: Path) -> Iterator[Path]:
    """The content of a ``.nemo`` archive that :func:`save_nemo` wrote, as a folder.

    Raises:
        CheckpointError: missing, truncated, hostile, or of another model.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    with tempfile.TemporaryDirectory() as name:
        try:
            with tarfile.open(path, "r:") as tar:
                members = {m.name.removeprefix("./") for m in tar.getmembers()}
                if CONFIG not in members or not members & {SINGLE, INDEX}:
                    raise CheckpointError(
                        f"{path} is a NeMo archive of another kind of model (it holds "
                        f"{', '.join(sorted(members)[:5])}); "
                        "MTBISALM.restore_from opens what export.py writes."
                    )
                unsafe = [m for m in members if m.startswith("/") or ".." in Path(m).parts]
                # Links too, by which archives write outside although Python's filter looks at them.
                unsafe += [m.name for m in tar.getmembers() if not (m.isfile() or m.isdir())]
                if unsafe:
                    raise CheckpointError(
                        f"{path} is unsafe: it holds {unsafe[0]}, no plain file within it; it was not opened."
                    )
                tar.extractall(name, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"{path} does not fit into {tempfile.gettempdir()}, where it is unpacked; let TMPDIR name a folder "
                    "with room, or serve the exported directory (mtbi export hf=...)."
                ) from error
            raise CheckpointError(
                f"{path} is damaged or unsafe ({error}); it was not opened. Copy it again."
            ) from error
        yield Path(name)


def checked_directory(folder: Path) -> dict[str, Path]:
    """Names of the tensors of an exported directory and the files that hold them, after every check that needs no
    model.

    Raises:
        CheckpointError: no export, of another kind of model, damaged, or one that asks for its own code to be run.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not an exported model: it has no {CONFIG}.")
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} is not an exported model: it has neither {SINGLE} nor {INDEX}.")
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} has {SINGLE} and {INDEX}, of two exports. Remove what belongs to the older one."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged ({error}). Copy it again.") from error
    perception = config.get("perception") if isinstance(config, dict) else None
    if not isinstance(perception, dict) or "modality_adapter" not in perception:
        raise CheckpointError(
            f"{folder / CONFIG} does not describe a speech LLM: it has no perception.modality_adapter."
        )
    if any(value for key, value in _entries(config) if key == "trust_remote_code"):
        raise CheckpointError(
            f"{folder / CONFIG} asks to run code that came with the model; set trust_remote_code to false."
        )
    for name in ("preprocessor", "encoder"):  # else NeMo would look for a model of its own
        if not isinstance(perception.get(name), dict) or "_target_" not in perception[name]:
            raise CheckpointError(f"{folder / CONFIG} does not describe its perception.{name}.")
    for key, value in _entries(perception):
        if key in OF_HYDRA:
            raise CheckpointError(f"{CONFIG} holds {key}, which no export of nemo_mtbi has.")
        if isinstance(value, str) and "${" in value:
            raise CheckpointError(f"{CONFIG} holds {value!r}: an exported configuration has values, no interpolations.")
        if key == "_target_":
            module_class(value)
    return weights_of(folder)


def weights_of(folder: Path) -> dict[str, Path]:
    """Names of the tensors of a folder and the files that hold them.

    Raises:
        CheckpointError: a file is missing, truncated, or holds other tensors than the index says.
    """
    try:
        files = weight_files(folder)
        for file in sorted(set(files.values())):
            with safe_open(file, "pt") as weights:
                lacking = {name for name, own in files.items() if own == file} - set(weights.keys())
            if lacking:
                raise CheckpointError(f"{file} lacks {sorted(lacking)[0]}, which {INDEX} says it has. Copy it again.")
    except SafetensorError as error:
        raise CheckpointError(
            f"A file of weights in {folder} is truncated or no safetensors file ({error})."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder} lacks a file of its weights ({error}). Copy it again.") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({error}). Copy it again.") from error
    return files


def module_class(target: Any) -> type[nn.Module]:
    """The class of a part of an exported model, whose configuration comes from whoever made the file.

    NeMo itself would call functions of its own too, some of which write files, and make whole models.

    Raises:
        CheckpointError: ``target`` is no ``nn.Module`` of :data:`PARTS_OF`.
    """
    try:
        found = resolve_name(target) if str(target).startswith(PACKAGES) else None
    except (ImportError, AttributeError, ValueError):
        found = None
    if isinstance(found, type) and issubclass(found, nn.Module) and f"{found.__module__}.".startswith(PARTS_OF):
        return found
    raise CheckpointError(f"{CONFIG} names {target!r} as a part of the model, which is no module of nemo_mtbi or NeMo.")


def _entries(part: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within a configuration, with its key (of items of a list, that of the list)."""
    yield key, part
    if isinstance(part, dict | list):
        for name, value in part.items() if isinstance(part, dict) else ((key, value) for value in part):
            yield from _entries(value, name)


def require_every_weight(model: Any, folder: Path, names: Iterable[str]) -> None:
    """
    Raises:
        CheckpointError: the model has tensors that are not among the ``names`` in ``folder``.
    """
    tie = causal_lm(model.llm).config.tie_word_embeddings
    state = model.state_dict()
    tied = {n for n in state if tie and n.endswith("lm_head.weight")}
    own = {n for n in state if not n.endswith("_extra_state")}  # Megatron's layers name one that is empty
    own -= {n for n in own if state[n].numel() == 0}
    missing = own - set(names) - tied
    if missing:
        raise CheckpointError(
            f"The weights in {folder} lack {len(missing)} tensors of the model, e.g. {sorted(missing)[0]}."
        )
