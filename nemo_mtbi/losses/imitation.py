"""The behavior-imitation objective (arXiv 2505.18644; Hinton et al. 2015 for the temperature), fused over chunks.

    CE = -sum_i log P_student(r_i)
    KL = T^2 * sum_i D(P_teacher(.; T), P_student(.; T))         D: forward_kl, reverse_kl or jensen_shannon
    L  = sum_i weight_i * (w_ce * CE_i + w_kl * KL_i)

Only hidden states of *response positions* come in (the position before token ``r_i`` predicts ``r_i``). They pass
through ``lm_head`` a chunk of rows at a time, and the gradient is taken in the same pass, so no (R, V) tensor is ever
held.
The result is a sum: the caller divides by the number of response tokens (or answers) over all ranks and accumulation
steps.

Letters: R response tokens, H hidden size, V vocabulary (V_local on a tensor-parallel rank), K cached teacher entries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.chunk import ChunkSettings, chunk_loss, direct_chunk_loss, is_direct
from nemo_mtbi.losses.head import Head, accumulation_dtype, raw_logits
from nemo_mtbi.losses.objective import CachedTeacher as CachedTeacher
from nemo_mtbi.losses.objective import ImitationObjective as ImitationObjective

# One fp32 (rows, V) tensor of a chunk; a handful of them are alive at a time. On CPUs smaller chunks stay near the
# caches.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}


@dataclass(frozen=True)
class ImitationLoss:
    """Sums over the R response tokens of a micro-batch; only ``loss`` carries a gradient.

    Attributes:
        loss: sum of weighted token losses.
        ce: sum of -log P_student(r_i), unweighted.
        kl: sum of divergences (with T^2), unweighted; zero if there is no teacher.
        per_token: (R,) weighted loss of each response token.
        agreed: (R,) whether the student's most likely token is the teacher's.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    per_token: Tensor
    agreed: Tensor


def imitation_loss(
    hidden: Tensor,
    head: Head,
    response_ids: Tensor,
    objective: ImitationObjective,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    cached_teacher: CachedTeacher | None = None,
    token_weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> ImitationLoss:
    """Behavior-imitation loss of R response tokens.

    Args:
        hidden: (R, H) the student's last hidden states at the positions before each response token.
        head: the student's output layer.
        response_ids: (R,) the response tokens, end-of-turn included.
        objective: weights, temperature and divergence.
        teacher_hidden: (R, H) the text LLM's hidden states at the same response positions (online teacher).
        teacher_head: the teacher's output layer; the student's own (detached) if not given.
        cached_teacher: top-k log-probabilities stored with the targets (offline teacher).
        token_weights: (R,) per-token weights, e.g. per-task weights.
        chunk_rows: rows through ``lm_head`` at a time; by default as many as fit in CHUNK_BYTES of fp32 logits.

    Raises:
        ConfigError: w_kl > 0 without a teacher, or two teachers.
    """
    if objective.w_kl > 0 and (teacher_hidden is None) == (cached_teacher is None):
        raise ConfigError("w_kl > 0 needs exactly one teacher: teacher_hidden (online) or cached_teacher (top-k).")
    rows = response_ids.shape[0]
    if token_weights is None:
        token_weights = torch.ones(rows, device=hidden.device)
    if teacher_head is None and teacher_hidden is not None:
        teacher_head = Head(head.weight.detach(), _detach(head.bias), head.scale, head.softcap, head.shard)
    chunk_rows = chunk_rows or max(
        1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // (4 * head.weight.shape[0])
    )
    settings = ChunkSettings(
        objective,
        head.scale,
        head.softcap,
        head.shard,
        response_ids,
        token_weights,
        teacher_hidden,
        teacher_head,
        cached_teacher,
        chunk_rows,
    )
    loss, ce, kl, per_token, agreed = _FusedImitation.apply(hidden, head.weight, head.bias, settings)
    return ImitationLoss(loss, ce, kl, per_token, agreed)


class _FusedImitation(torch.autograd.Function):
    """Forward computes the loss and, in the same pass over chunks, the gradients that backward scales and returns."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, s: ChunkSettings) -> tuple[Tensor, ...]:
        rows, accumulate = hidden.shape[0], accumulation_dtype(hidden.dtype)
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        needs_any = needs_hidden or needs_weight or needs_bias
        ce = torch.zeros(rows, dtype=accumulate, device=hidden.device)
        kl = torch.zeros_like(ce)
        agreed = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if needs_bias and bias is not None else None
        direct = needs_any and is_direct(s)
        for begin in range(0, rows, s.chunk_rows):
            part = slice(begin, begin + s.chunk_rows)
            logits = s.shard.mask_padding(raw_logits(hidden[part], weight, bias, s.scale, s.softcap))
            chunk = direct_chunk_loss(logits, s, part) if direct else chunk_loss(logits, s, part, needs_any)
            ce[part], kl[part], agreed[part], grad_logits = chunk
            if grad_logits is None:
                continue
            if not direct:
                grad_logits *= s.token_weights[part, None]
                if s.softcap is not None:
                    capped = torch.where(torch.isfinite(logits), logits, 0.0) / s.softcap
                    grad_logits *= 1 - capped * capped
                grad_logits *= s.scale
            grad = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        if grad_hidden is not None:
            s.shard.sum(grad_hidden)
        per_token = (s.objective.w_ce * ce + s.objective.w_kl * kl) * s.token_weights
        ctx.save_for_backward(
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
        )
        outputs = (per_token.sum(), ce.sum(), kl.sum(), per_token, agreed)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # A scalar factor alone reaches here, so the gradients taken in forward are exact.
        return *(g * grad_loss.to(g.dtype) if g is not None else None for g in ctx.saved_tensors), None


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
