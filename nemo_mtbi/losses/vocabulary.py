"""How the rows of ``lm_head`` are spread over tensor-parallel ranks, and the reductions that this needs.

``VocabularyShard()`` (the default) is the whole vocabulary on one rank: every reduction is the identity.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's slice of the vocabulary.

    Attributes:
        first_id: token id of the first row of the local ``lm_head`` weight.
        valid_rows: rows that are real tokens; the padding rows after them are masked out (None: all rows).
        group: process group over which the vocabulary is spread (None: not spread).
    """

    first_id: int = 0
    valid_rows: int | None = None
    group: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def peak(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit and its token id, the lowest id among equals. logits (R, V_local) -> (R,), (R,)."""
        peak, column = logits.max(-1)
        if self.group is None:
            return peak, column + self.first_id
        best = self.max(peak.clone())
        ids = torch.where(peak == best, column + self.first_id, torch.iinfo(torch.long).max)
        dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=self.group)
        return best, ids

    def mask_padding(self, logits: Tensor) -> Tensor:
        """Give the padding rows of the vocabulary probability zero, in place. logits: (R, V_local)."""
        if self.valid_rows is not None and self.valid_rows < logits.shape[-1]:
            logits[..., self.valid_rows :] = -torch.inf
        return logits

    def local(self, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Local column of each token id and whether it lives here. ids: any shape, global token ids."""
        columns = ids - self.first_id
        here = (columns >= 0) & (columns < (rows if self.valid_rows is None else self.valid_rows))
        return columns.clamp(0, rows - 1), here

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Logits of global token ids. logits (R, V_local), ids (R, K) -> (R, K)."""
        columns, here = self.local(ids, logits.shape[-1])
        return self.sum(logits.gather(-1, columns).where(here, 0.0))

    def logsumexp(self, logits: Tensor) -> Tensor:
        """log sum exp over the whole vocabulary. logits (R, V_local) -> (R,)."""
        if self.group is None:
            return logits.logsumexp(-1)
        peak = self.max(logits.amax(-1)).clamp_min(torch.finfo(logits.dtype).min)
        return self.sum((logits - peak[:, None]).exp_().sum(-1)).log() + peak


WHOLE_VOCABULARY = VocabularyShard()
