"""Validation figures as ratios of sums, so that every response token, or answer, weighs alike."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.losses.imitation import ImitationLoss
from nemo_mtbi.parallel.ranks import gathered_objects, summed


class ValidationSums:
    """Sums of one validation epoch by data set (loss, KL, agreed, tokens, what the loss is divided by) and by task (the
    same without KL)."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
        self.task_sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))

    def visit(self, name: str) -> None:
        """A rank whose batches are all unreadable takes part in the sums of every data set too."""
        self.sums[name] += 0.0

    def add_alignment(self, name: str, loss: Tensor, count: int) -> None:
        """A batch of the alignment stage."""
        self.sums[name] += torch.tensor([float(loss), 0.0, 0.0, float(count), float(count)], dtype=torch.float64)

    def add(self, name: str, loss: ImitationLoss, by_task: dict[str, Tensor]) -> None:
        """A batch of the imitation stage."""
        _, agreed, tokens, counted = torch.stack(list(by_task.values())).sum(0)
        values = [loss.loss, loss.kl, agreed, tokens, counted]
        self.sums[name] += torch.stack([v.detach().float() for v in values]).to("cpu", torch.float64)
        for task, sums in by_task.items():
            self.task_sums[task] += sums.to("cpu", torch.float64)

    def log(self, log: Callable[..., Any], imitation: bool, device: torch.device, group: Any) -> None:
        """Log every data set, all together, and every task, over the data-parallel ranks.

        Args:
            log: Lightning's.
            imitation: whether KL and agreement have a meaning.
            device, group: where and over which ranks sums are taken.
        """
        total = torch.zeros(5, dtype=torch.float64)
        for name in sorted(self.sums):
            sums = summed(self.sums[name].to(device, torch.float32), group).cpu()
            total += sums
            self._log_set(log, f"_{name}", sums, imitation)
        if self.sums:
            self._log_set(log, "", total, imitation)
        for task, (loss, agreed, tokens, counted) in sorted(self._tasks_over_ranks(group).items()):
            log(f"val_loss_by_task/{task}", loss / max(1.0, counted), on_epoch=True)
            log(f"val_agreement_by_task/{task}", agreed / max(1.0, tokens), on_epoch=True)

    def _tasks_over_ranks(self, group: Any) -> dict[str, list[float]]:
        """Ranks may have met different tasks."""
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
        for part in gathered_objects(dict(self.task_sums), group):
            for key, value in part.items():
                total[key] += value
        return {key: value.tolist() for key, value in total.items()}

    @staticmethod
    def _log_set(log: Callable[..., Any], suffix: str, sums: Tensor, imitation: bool) -> None:
        loss, kl, agreed, *counts = sums.tolist()
        tokens, counted = (count or math.nan for count in counts)  # of no example nothing is known
        log(f"val_loss{suffix}", loss / counted, on_epoch=True, prog_bar=not suffix)
        if imitation:
            log(f"val_kl{suffix}", kl / tokens, on_epoch=True)
            log(f"val_agreement{suffix}", agreed / tokens, on_epoch=True, prog_bar=not suffix)
