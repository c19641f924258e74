"""The behavior-imitation objective (arXiv 2505.18644; Hinton et al. 2015 for the temperature), fused over chunks.

    CE = -sum_i log P_student(r_i)
    KL = T^2 * sum_i D(P_teacher(.; T), P_student(.; T))         D: forward_kl, reverse_kl or jensen_shannon
    L  = sum_i weight_i * (w_ce * CE_i + w_kl * KL_i)

Only hidden states of *response positions* come in (the position before token ``r_i`` predicts ``r_i``). They pass through
``lm_head`` a chunk of rows at a time, and the gradient is taken in the same pass, so no (R, V) tensor is ever held.
The result is a sum: the caller divides by the number of response tokens over all ranks and accumulation steps.

Letters: R response tokens, H hidden size, V vocabulary (V_local on a tensor-parallel rank), K cached teacher entries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.divergence import DIVERGENCES, Divergence
from nemo_mtbi.losses.vocabulary import WHOLE_VOCABULARY, VocabularyShard

# One fp32 (rows, V) tensor of a chunk; a handful of them are alive at a time. On CPUs smaller chunks stay near the caches.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}
# Log-probabilities of impossible entries (vocabulary padding, an empty rest bucket), finite so that 0 * log 0 is 0.
LOG_P_FLOOR, LOG_Q_FLOOR = -100.0, -1e4


@dataclass(frozen=True)
class ImitationObjective:
    """Weights and form of the objective.

    Attributes:
        w_ce: weight of the cross-entropy with the teacher's response tokens.
        w_kl: weight of the divergence from the teacher's distribution.
        temperature: T, applied to both distributions; the divergence is multiplied by T^2.
        divergence: ``forward_kl``, ``reverse_kl`` or ``jensen_shannon``.

    Raises:
        ConfigError: unknown divergence, negative weight, or temperature that is not positive.
    """

    w_ce: float = 1.0
    w_kl: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ConfigError(f"Unknown divergence {self.divergence!r}. Known: {', '.join(DIVERGENCES)}.")
        if self.w_ce < 0 or self.w_kl < 0 or self.w_ce + self.w_kl == 0:
            raise ConfigError(f"w_ce={self.w_ce}, w_kl={self.w_kl}: weights must be >= 0 and not both 0.")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be positive.")


CROSS_ENTROPY = ImitationObjective(w_ce=1.0, w_kl=0.0)


@dataclass(frozen=True)
class Head:
    """The output layer: ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``.

    Attributes:
        weight: (V, H); rows of this rank only when the vocabulary is sharded.
        bias: (V,) or None.
        scale: factor on the logits (Granite, Cohere).
        softcap: soft-capping value (Gemma 2) or None.
        shard: where the rows of ``weight`` stand in the vocabulary.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    shard: VocabularyShard = WHOLE_VOCABULARY

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (R, H) -> fp32 (fp64 for fp64) logits (R, V_local); padding rows of the vocabulary are -inf."""
        return self.shard.mask_padding(_logits(hidden, self.weight, self.bias, self.scale, self.softcap))


@dataclass(frozen=True)
class CachedTeacher:
    """Top-k of the teacher's distribution *at the objective's temperature*; the remaining mass is one rest bucket.

    Attributes:
        token_ids: (R, K) int64.
        log_probs: (R, K) log-probabilities at the temperature of the objective.
    """

    token_ids: Tensor
    log_probs: Tensor


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
    settings = _Settings(
        objective, head.scale, head.softcap, head.shard, response_ids, token_weights, teacher_hidden, teacher_head,
        cached_teacher, chunk_rows,
    )  # fmt: skip
    loss, ce, kl, per_token, agreed = _FusedImitation.apply(hidden, head.weight, head.bias, settings)
    return ImitationLoss(loss, ce, kl, per_token, agreed)


@dataclass(frozen=True)
class _Settings:
    objective: ImitationObjective
    scale: float
    softcap: float | None
    shard: VocabularyShard
    response_ids: Tensor
    token_weights: Tensor
    teacher_hidden: Tensor | None
    teacher_head: Head | None
    cached_teacher: CachedTeacher | None
    chunk_rows: int


class _FusedImitation(torch.autograd.Function):
    """Forward computes the loss and, in the same pass over chunks, the gradients that backward scales and returns."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, s: _Settings) -> tuple[Tensor, ...]:
        rows, accumulate = hidden.shape[0], _accumulation_dtype(hidden.dtype)
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        needs_any = needs_hidden or needs_weight or needs_bias
        ce = torch.zeros(rows, dtype=accumulate, device=hidden.device)
        kl = torch.zeros_like(ce)
        agreed = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if needs_bias and bias is not None else None
        direct = needs_any and _is_direct(s)
        for begin in range(0, rows, s.chunk_rows):
            part = slice(begin, begin + s.chunk_rows)
            logits = s.shard.mask_padding(_logits(hidden[part], weight, bias, s.scale, s.softcap))
            chunk = _direct_chunk(logits, s, part) if direct else _chunk(logits, s, part, needs_any)
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


def _chunk(logits: Tensor, s: _Settings, part: slice, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Losses (rows,) of one chunk and the gradient of ``w_ce * CE + w_kl * KL`` with respect to its logits."""
    shard, objective, ids = s.shard, s.objective, s.response_ids[part]
    target = shard.gather(logits, ids[:, None])[:, 0]
    log_z = shard.logsumexp(logits)
    ce = log_z - target
    agreed = shard.peak(logits)[1] == ids  # not target >= max: low-precision logits tie
    grad = None
    if needs_grad:
        grad = (logits - log_z[:, None]).exp_().mul_(objective.w_ce)
        columns, here = shard.local(ids[:, None], logits.shape[-1])
        grad.scatter_add_(-1, columns, -objective.w_ce * here.to(grad.dtype))
    if objective.w_kl == 0:
        return ce, torch.zeros_like(ce), agreed, grad
    temperature = objective.temperature
    student = logits / temperature if temperature != 1 else logits
    log_zt = log_z if temperature == 1 else shard.logsumexp(student)
    divergence = DIVERGENCES[objective.divergence]
    if s.cached_teacher is not None:
        kl, grad_kl = _cached_divergence(student, log_zt, s.cached_teacher, part, divergence, shard, needs_grad)
    else:
        assert s.teacher_hidden is not None and s.teacher_head is not None
        teacher = s.teacher_head.logits(s.teacher_hidden[part])
        if temperature != 1:
            teacher /= temperature
        kl, grad_kl = _full_divergence(student, log_zt, teacher, divergence, shard, needs_grad)
    if grad is not None and grad_kl is not None:
        grad += grad_kl.mul_(objective.w_kl * temperature)  # T^2 of the objective times 1/T of the chain rule
    return ce, kl * temperature**2, agreed, grad


def _is_direct(s: _Settings) -> bool:
    """Whether :func:`_direct_chunk` knows this objective: the default one, and all divergences of a cached teacher."""
    o = s.objective
    known = o.w_kl == 0 or s.cached_teacher is not None or o.divergence == "forward_kl"
    return known and o.temperature == 1 and s.softcap is None


def _direct_chunk(logits: Tensor, s: _Settings, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What :func:`_chunk` gives, weighted and scaled, with one exponential an entry: ``e = exp(logits - peak)``, in place.

    The gradient with respect to a logit is ``e`` times a factor of its row, but for the K cached entries and the target.
    """
    shard, o, ids = s.shard, s.objective, s.response_ids[part]
    weights = s.token_weights[part].to(logits.dtype) * s.scale
    target = shard.gather(logits, ids[:, None])[:, 0]
    peak, best = shard.peak(logits)
    agreed = best == ids
    if o.w_kl > 0 and s.cached_teacher is not None:
        log_z, kl, grad = _direct_cached(logits, peak, s, part, weights)
    elif o.w_kl > 0:
        assert s.teacher_hidden is not None and s.teacher_head is not None
        teacher = s.teacher_head.logits(s.teacher_hidden[part])
        log_z, kl, grad = _direct_full(logits, peak, teacher, s, weights)
    else:
        grad = logits.sub_(peak[:, None]).exp_()
        z = shard.sum(grad.sum(-1))
        log_z, kl = peak + z.log(), torch.zeros_like(z)
        grad.mul_((weights * o.w_ce / z)[:, None])
    if o.w_ce > 0:
        columns, here = shard.local(ids[:, None], grad.shape[-1])
        grad.scatter_add_(-1, columns, -(o.w_ce * weights)[:, None] * here.to(grad.dtype))
    return log_z - target, kl, agreed, grad


def _direct_cached(
    logits: Tensor, peak: Tensor, s: _Settings, part: slice, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> log Z (rows,), divergence (rows,), gradient of both terms but for the target's own entry (rows, V_local)."""
    assert s.cached_teacher is not None
    shard, o = s.shard, s.objective
    top_ids, log_p = _teacher_buckets(s.cached_teacher, part, logits.dtype)
    top = shard.gather(logits, top_ids)
    columns, here = shard.local(top_ids, logits.shape[-1])
    e = logits.sub_(peak[:, None]).exp_()
    # "amin": ids of other shards are clamped onto local columns and must not undo a removal there.
    e.scatter_reduce_(-1, columns, torch.where(here, 0.0, torch.inf).to(e.dtype), "amin")
    e_top = (top - peak[:, None]).exp()
    rest = shard.sum(e.sum(-1)).clamp_min(torch.finfo(e.dtype).tiny)
    z = rest + e_top.sum(-1)
    log_z = peak + z.log()
    log_q = torch.cat([top, (peak + rest.log())[:, None]], -1) - log_z[:, None]
    terms, a = DIVERGENCES[o.divergence](log_p, log_q.clamp_min(LOG_Q_FLOOR))
    through_z = (o.w_ce - o.w_kl * a.sum(-1)) / z
    e.mul_((weights * (o.w_kl * a[:, -1] / rest + through_z))[:, None])
    own = weights[:, None] * (o.w_kl * a[:, :-1] + through_z[:, None] * e_top)
    e.scatter_add_(-1, columns, own * here.to(e.dtype))
    return log_z, terms.sum(-1), e


def _direct_full(
    logits: Tensor, peak: Tensor, teacher: Tensor, s: _Settings, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a whole teacher's distribution (``teacher``: its logits, overwritten) and the forward KL."""
    shard, o = s.shard, s.objective
    teacher_peak, _ = shard.peak(teacher)
    e_teacher = (teacher - teacher_peak[:, None]).exp_()
    z_teacher = shard.sum(e_teacher.sum(-1))
    difference = teacher.sub_(logits)
    if shard.valid_rows is not None:
        difference[:, shard.valid_rows :] = 0.0
    e = logits.sub_(peak[:, None]).exp_()
    z = shard.sum(e.sum(-1))
    log_z, log_z_teacher = peak + z.log(), teacher_peak + z_teacher.log()
    difference += (log_z - log_z_teacher)[:, None]
    kl = shard.sum(torch.einsum("rv,rv->r", e_teacher, difference)) / z_teacher
    e.mul_((weights * (o.w_ce + o.w_kl) / z)[:, None])
    e.sub_(e_teacher.mul_((weights * o.w_kl / z_teacher)[:, None]))
    return log_z, kl, e


def _teacher_buckets(cached: CachedTeacher, part: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ids (rows, K) and log-probabilities (rows, K + 1) of the cached entries and the rest bucket."""
    log_p = cached.log_probs[part].to(dtype)
    mass = log_p.exp().sum(-1, keepdim=True)
    log_p = log_p - mass.clamp_min(1).log()  # rounding to float16 may push the sum over one
    rest = (1 - mass).clamp_min(0).log().clamp_min(LOG_P_FLOOR)  # an empty rest: no mass, but finite
    return cached.token_ids[part], torch.cat([log_p, rest], -1)


def _full_divergence(
    student: Tensor, log_z: Tensor, teacher: Tensor, divergence: Divergence, shard: VocabularyShard, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence (rows,) over the whole vocabulary and its gradient with respect to the student's scaled logits."""
    log_q = student - log_z[:, None]
    log_p = teacher.sub_(shard.logsumexp(teacher)[:, None])
    terms, a = divergence(log_p.clamp_min(LOG_Q_FLOOR), log_q.clamp_min(LOG_Q_FLOOR))
    kl = shard.sum(terms.sum(-1))
    if not needs_grad:
        return kl, None
    return kl, a - log_q.exp() * shard.sum(a.sum(-1))[:, None]


def _cached_divergence(
    student: Tensor,
    log_z: Tensor,
    cached: CachedTeacher,
    part: slice,
    divergence: Divergence,
    shard: VocabularyShard,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Divergence (rows,) over the K cached entries and the rest bucket, and its gradient (rows, V_local)."""
    ids, log_p = _teacher_buckets(cached, part, student.dtype)
    columns, here = shard.local(ids, student.shape[-1])
    # "amin": ids of other shards are clamped onto local columns and must not undo a removal there.
    rest = student.scatter_reduce(-1, columns, torch.where(here, -torch.inf, torch.inf).to(student.dtype), "amin")
    log_z_rest = shard.logsumexp(rest)[:, None]
    log_q = torch.cat([shard.gather(student, ids), log_z_rest], -1) - log_z[:, None]
    log_q = log_q.clamp_min(LOG_Q_FLOOR)
    terms, a = divergence(log_p, log_q)
    if not needs_grad:
        return terms.sum(-1), None
    # d/d logits of the rest bucket spreads over its members by their softmax within the rest.
    grad = rest.sub_(log_z_rest.clamp_min(torch.finfo(rest.dtype).min)).exp_().mul_(a[:, -1:])
    grad.scatter_add_(-1, columns, a[:, :-1] * here.to(a.dtype))
    grad -= (student - log_z[:, None]).exp_() * a.sum(-1, keepdim=True)
    return terms.sum(-1), grad


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).to(_accumulation_dtype(hidden.dtype))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
