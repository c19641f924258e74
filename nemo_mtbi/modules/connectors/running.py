"""What is known from all of training so far, of all ranks together, in buffers that are trained on and used alike.

Letters: B utterances, S hypotheses.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PASSES_COUNTED = 200  # of training, whose windows say what is usual
SMALLEST_DEVIATION = 1e-4  # of normalized features and their statistics
FARTHEST = 10.0  # deviations from the mean: silence, or a few frames, would drown everything else
TASKS = 256  # whose influences are told apart; tasks of one number share theirs
UNTRIED = 0.25  # differences of 1 nat of the loss that a choice begins with
EVEN_SHARE = 0.1  # of the draws, in which every choice has the same chance


class Running(nn.Module):
    """Buffers that stay as precise as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Running":
        """Move to a device, but never to another precision: a mean is many times its deviation."""
        for name, buffer in self.named_buffers(recurse=False):
            moved = fn(buffer)
            setattr(self, name, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        return self


def of_all_ranks(sums: Tensor) -> None:
    """Add those of the other ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)


class Standardization(Running):
    """Values less their mean, over their standard deviation, of the first ``PASSES_COUNTED`` micro-batches of training.

    In training as in use (batch normalization would differ); of all ranks together. Before the first of them it only
    clips, at ``FARTHEST``. Vectors that are not finite do not count. During these passes a gradient depends on how a
    step is cut into micro-batches, as with batch normalization.

    Args:
        size: F, of the vectors.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    passes: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("squares", torch.zeros(size))  # sum of squared differences from the mean
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self._passes = 0  # the buffer's value, without asking a GPU for it

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._passes = int(state_dict.get(f"{prefix}passes", self._passes))

    def forward(self, values: Tensor) -> Tensor:
        """(B, F) -> (B, F), float32."""
        if self.training and torch.is_grad_enabled() and self._passes < PASSES_COUNTED:
            self._add(values)
        deviation = (self.squares / self.count.clamp_min(1)).sqrt()
        known = self.count > 1
        apart = (values - self.mean) / torch.where(known, deviation.clamp_min(SMALLEST_DEVIATION), 1.0)
        return apart.clamp(-FARTHEST, FARTHEST)

    @torch.no_grad()
    def _add(self, values: Tensor) -> None:
        """Chan et al. 1979, with sums that are relative to the mean so far."""
        self._passes += 1
        self.passes.fill_(self._passes)
        finite = values.isfinite().all(1, keepdim=True)
        apart = torch.where(finite, values - self.mean, 0.0).double()
        sums = torch.cat([apart.sum(0), apart.square().sum(0), finite.sum()[None].double()])
        of_all_ranks(sums)
        (first, second), added = sums[:-1].view(2, -1), sums[-1]
        total = self.count + added
        self.squares += second - first.square() / total.clamp_min(1)
        self.mean += first / total.clamp_min(1)
        self.count.copy_(total)


def task_numbers(tasks: Iterable[str]) -> list[int]:
    """Of names, below ``TASKS``; the same in every process."""
    return [zlib.crc32(task.encode()) % TASKS for task in tasks]


class Influence(Running):
    """How much each choice of a description has mattered to the answers to a task: mean absolute difference of risks.

    It says which choice is worth another forward pass. Who draws by it divides by the chance (importance sampling), so
    it changes no expectation, and least variance has what is drawn in proportion to its size.

    Args:
        choices: C.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, choices: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(TASKS, choices))
        self.register_buffer("counts", torch.zeros(TASKS, choices))

    def chances(self, tasks: Tensor) -> Tensor:
        """Of each choice, (B, C), for tasks (B,) of :func:`task_numbers`."""
        means = (self.sums[tasks] + UNTRIED) / (self.counts[tasks] + UNTRIED)
        return (1 - EVEN_SHARE) * means / means.sum(-1, keepdim=True) + EVEN_SHARE / means.shape[-1]

    @torch.no_grad()
    def add(self, tasks: Tensor, changed: Tensor, differences: Tensor, copies: int = 1) -> None:
        """What was found out in a micro-batch, so the draws of the next one depend on how a step is cut.

        Args:
            tasks: (B,).
            changed: (B, S, C), True for the one choice that a hypothesis changes.
            differences: (B, S) of risks. Rows without any, and those that are not finite, say nothing.
            copies: ranks that add the same.
        """
        told = differences.isfinite().all(1) & (differences > 0).any(1)
        counted = (changed & told[:, None, None]).float()
        known = torch.where(told[:, None], differences, 0.0).float()
        own = torch.stack([(counted * known[..., None]).sum(1), counted.sum(1)])
        added = torch.zeros(2, *self.sums.shape, device=own.device).index_add(1, tasks, own)
        of_all_ranks(added)
        self.sums += added[0] / copies
        self.counts += added[1] / copies
