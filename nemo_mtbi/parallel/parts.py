"""Which part of a whole parameter a tensor-parallel rank holds; parts of weights, gradients and optimizer states."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """The part of a whole weight that a rank holds: ranges of dimension ``dim``, then zeros up to ``size`` entries.

    Kept on the parameter as ``tensor_part``, so that it can be read from a checkpoint without the rest.

    Attributes:
        copies: neighbouring ranks that hold this same part (key/value heads fewer than ranks).
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]
    size: int
    copies: int = 1

    @staticmethod
    def of_blocks(dim: int, blocks: list[int], parts: list[tuple[int, int]], copies: int = 1) -> "Part":
        """Of a weight made of ``blocks`` one after another, of each the share ``(index, of how many)``."""
        ranges, begin = [], 0
        for block, (index, count) in zip(blocks, parts, strict=True):
            share = block // count
            ranges.append((begin + index * share, begin + (index + 1) * share))
            begin += block
        return Part(dim, tuple(ranges), sum(e - b for b, e in ranges), copies)

    def of(self, whole: Any, length: int) -> Tensor:
        """The part of a tensor, or of a slice of a safetensors file, whose dimension ``dim`` is ``length`` long."""
        pieces = []
        for begin, end in self.ranges:
            begin, end = min(begin, length), min(end, length)
            pieces.append(whole[begin:end] if self.dim == 0 else whole[:, begin:end])
        missing = self.size - sum(p.shape[self.dim] for p in pieces)
        if missing:
            shape = list(pieces[0].shape)
            shape[self.dim] = missing
            pieces.append(pieces[0].new_zeros(shape))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def parameter(self, whole: Tensor) -> nn.Parameter:
        """This part of a loaded (or not yet loaded, ``meta``) parameter."""
        part = self.of(whole.detach(), whole.shape[self.dim])
        new = nn.Parameter(part if part.is_meta else part.clone(), requires_grad=whole.requires_grad)
        new.tensor_part = self  # type: ignore[attr-defined]
        return new

    def whole(self, own: Tensor, group: Any) -> Tensor:
        """The whole tensor, of every rank's part; all ranks of ``group`` call this together."""
        size = dist.get_world_size(group)
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, self, group=group)
        pieces = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(pieces, own.detach().contiguous(), group=group)
        shape = list(own.shape)
        shape[self.dim] = max(end for part in parts for _, end in part.ranges)
        whole = own.new_zeros(shape)
        for part, piece in zip(parts, pieces, strict=True):
            position = 0
            for begin, end in part.ranges:
                whole.narrow(self.dim, begin, end - begin).copy_(piece.narrow(self.dim, position, end - begin))
                position += end - begin
        return whole


def part_of(parameter: Tensor) -> Part | None:
    """The part that this rank holds; None for a parameter that every rank holds whole."""
    return getattr(parameter, "tensor_part", None)


def reduce_gradients(parameters: list[nn.Parameter], group: Any, source: int) -> None:
    """Complete the gradients within a tensor-parallel group.

    - Whole parameters of which each rank saw a part of the effect (``partial_gradient``): summed.
    - Parts that several ranks hold: summed over the ranks that hold them.
    - Whole parameters: the first rank's. Atomic additions on GPUs round differently on each rank, and connectors that
      drift apart would in the end emit different numbers of positions.

    Args:
        source: global rank of the group's first process.
    """
    for parameter in parameters:
        gradient, part = parameter.grad, part_of(parameter)
        if gradient is None:
            continue
        if part is None:
            if getattr(parameter, "partial_gradient", False):
                dist.all_reduce(gradient, group=group)
            else:
                dist.broadcast(gradient, source, group=group)
        elif part.copies > 1:
            pieces = [torch.empty_like(gradient) for _ in range(dist.get_world_size(group))]
            dist.all_gather(pieces, gradient.contiguous(), group=group)
            first = dist.get_rank(group) // part.copies * part.copies
            gradient.copy_(torch.stack(pieces[first : first + part.copies]).sum(0))


def gradient_norm(parameters: list[nn.Parameter], group: Any = None) -> Tensor:
    """2-norm of the gradients of whole parameters; ``group`` is where parts of them are spread."""
    whole = [p.grad for p in parameters if p.grad is not None and part_of(p) is None]
    spread = [(p.grad, part_of(p)) for p in parameters if p.grad is not None and part_of(p) is not None]
    norm = torch.nn.utils.get_total_norm(whole)
    if not spread:
        return norm
    squares = sum((g / math.sqrt(part.copies)).float().square().sum() for g, part in spread if part is not None)
    assert isinstance(squares, Tensor)
    dist.all_reduce(squares, group=group)
    return (norm.float().square() + squares).sqrt()
