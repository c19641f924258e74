"""Communication around a block of sharded layers (attention, feed-forward): once for all layers that read the same
input.

Without sequence parallelism the input of a block is the same on every rank, its gradient is summed over the ranks,
and the output of its row-parallel layer is summed (2 all-reduces a block, as Megatron-LM, arXiv 1909.08053). With it
(arXiv 2205.05198) each rank keeps an equal share of the positions of the residual stream between blocks: norms and
residuals are computed once, and the activations kept for them shrink by the number of ranks. The volume sent is the
same.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from nemo_mtbi.errors import ConfigError

INPUT = "hidden_states"


def share_input(block: nn.Module) -> None:
    """Sum the gradient of the block's input over the ranks; its column-parallel layers do not."""
    block.register_forward_pre_hook(
        lambda _, args, kwargs: change_input(args, kwargs, copy_to_tensor_model_parallel_region), with_kwargs=True
    )


class SequenceParallel:
    """Hooks that keep the residual stream of an LLM's body spread over positions.

    Args:
        body: Transformers' model without output layer: ``layers``, and a final ``norm``.
        blocks: modules between which the stream is spread.
        size: ranks.

    Raises:
        ConfigError: the body is built differently.
    """

    def __init__(self, body: Any, blocks: list[nn.Module], size: int) -> None:
        layers, norm = getattr(body, "layers", None), getattr(body, "norm", None)
        if not layers or norm is None:
            raise ConfigError(
                f"sequence_parallel knows models with layers and a final norm; {type(body).__name__} has none. "
                "Set model.sequence_parallel=false."
            )
        self.size = size
        self.shape = torch.Size()
        layers[0].register_forward_pre_hook(lambda _, a, k: change_input(a, k, self.spread), with_kwargs=True)
        norm.register_forward_hook(lambda _, __, output: self.whole(output, same_everywhere=True))
        for block in blocks:
            block.register_forward_pre_hook(lambda _, a, k: change_input(a, k, self.whole), with_kwargs=True)
            block.register_forward_hook(lambda _, __, output: change_output(output, self.add_up))

    def spread(self, hidden: Tensor) -> Tensor:
        """(B, L, H), the same on every rank -> this rank's positions (1, ceil(B L / ranks), H)."""
        self.shape = hidden.shape
        return scatter_to_sequence_parallel_region(self._flat(hidden))[None]

    def whole(self, own: Tensor, same_everywhere: bool = False) -> Tensor:
        """This rank's positions -> (B, L, H). The gradient is summed, unless it is the ``same_everywhere``."""
        tokens = gather_from_sequence_parallel_region(own[0], tensor_parallel_output_grad=not same_everywhere)
        return tokens[: self.shape[0] * self.shape[1]].view(*self.shape[:2], -1)

    def add_up(self, partial: Tensor) -> Tensor:
        """(B, L, H), a summand on every rank -> this rank's positions of the sum."""
        return reduce_scatter_to_sequence_parallel_region(self._flat(partial))[None]

    def recomputation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of ``torch.utils.checkpoint``: a layer is recomputed with the shape of its own pass, though
        others have come since."""
        return nullcontext(), _WithShape(self)

    def _flat(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        return nn.functional.pad(tokens, (0, 0, 0, -len(tokens) % self.size))


class _WithShape(AbstractContextManager[None]):
    """May be entered again (``retain_graph``)."""

    def __init__(self, stream: SequenceParallel) -> None:
        self.stream, self.shape = stream, stream.shape

    def __enter__(self) -> None:
        self.other, self.stream.shape = self.stream.shape, self.shape

    def __exit__(self, *_: object) -> None:
        self.stream.shape = self.other


def change_input(args: Any, kwargs: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """The call's arguments with the hidden states changed; they come first, or by their name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, INPUT: change(kwargs[INPUT])}


def change_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with its hidden states, alone or first of a tuple, changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
