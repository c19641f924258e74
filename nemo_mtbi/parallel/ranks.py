"""Collectives over the data-parallel ranks that are the identity in a single process."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def distributed() -> bool:
    """Whether this process is one of a job of several."""
    return dist.is_available() and dist.is_initialized()


def rank_and_size(group: Any) -> tuple[int, int]:
    """This process's place in a group (None: all processes), and the group's size."""
    return (dist.get_rank(group), dist.get_world_size(group)) if distributed() else (0, 1)


def summed(tensor: Tensor, group: Any) -> Tensor:
    """Sum over the ranks of a group, in place."""
    if distributed():
        dist.all_reduce(tensor, group=group)
    return tensor


def gathered_objects(value: Any, group: Any) -> list[Any]:
    """A picklable value of every rank of a group."""
    if not distributed():
        return [value]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, value, group=group)
    return parts
