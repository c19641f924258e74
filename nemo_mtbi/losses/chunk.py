"""CE, divergence and their gradient for one chunk of rows of the fused imitation loss.

Letters: R response tokens, V vocabulary (V_local on a tensor-parallel rank), K cached teacher entries.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_mtbi.losses.divergence import DIVERGENCES, Divergence, reverse_kl
from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.objective import CachedTeacher, ImitationObjective
from nemo_mtbi.losses.vocabulary import VocabularyShard

# Log-probabilities of impossible entries (vocabulary padding, an empty rest bucket), finite so that 0 * log 0 is 0.
LOG_P_FLOOR, LOG_Q_FLOOR = -100.0, -1e4
# The least that a cached teacher's rest bucket, and what fills its rows, have for the reverse KL, which would otherwise
# count 100 nats where rounding to float16 has left nothing.
LOG_REST_FLOOR = math.log(1e-4)


@dataclass(frozen=True)
class ChunkSettings:
    """What every chunk of one call needs; see :func:`nemo_mtbi.losses.imitation.imitation_loss`."""

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


def chunk_loss(
    logits: Tensor, s: ChunkSettings, part: slice, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
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


def is_direct(s: ChunkSettings) -> bool:
    """Whether :func:`direct_chunk_loss` knows this objective.

    The default one, and all divergences of a cached teacher.
    """
    o = s.objective
    known = o.w_kl == 0 or s.cached_teacher is not None or o.divergence == "forward_kl"
    return known and o.temperature == 1 and s.softcap is None


def direct_chunk_loss(logits: Tensor, s: ChunkSettings, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What :func:`chunk_loss` gives, weighted and scaled, with one exponential an entry: ``e = exp(logits - peak)``,
    in place.

    The gradient with respect to a logit is ``e`` times a factor of its row, but for the K cached entries and the
    target.
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
    logits: Tensor, peak: Tensor, s: ChunkSettings, part: slice, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> log Z (rows,), divergence (rows,), gradient of both terms but for the target's own entry (rows, V_local)."""
    assert s.cached_teacher is not None
    shard, o = s.shard, s.objective
    divergence = DIVERGENCES[o.divergence]
    top_ids, log_p = _teacher_buckets(s.cached_teacher, part, logits.dtype, divergence)
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
    terms, a = divergence(log_p, log_q.clamp_min(LOG_Q_FLOOR))
    through_z = (o.w_ce - o.w_kl * a.sum(-1)) / z
    e.mul_((weights * (o.w_kl * a[:, -1] / rest + through_z))[:, None])
    own = weights[:, None] * (o.w_kl * a[:, :-1] + through_z[:, None] * e_top)
    e.scatter_add_(-1, columns, own * here.to(e.dtype))
    return log_z, terms.sum(-1), e


def _direct_full(
    logits: Tensor, peak: Tensor, teacher: Tensor, s: ChunkSettings, weights: Tensor
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
    with torch.autocast(difference.device.type, enabled=False):  # a matrix product would be one of half precision
        kl = shard.sum(torch.einsum("rv,rv->r", e_teacher, difference)) / z_teacher
    e.mul_((weights * (o.w_ce + o.w_kl) / z)[:, None])
    e.sub_(e_teacher.mul_((weights * o.w_kl / z_teacher)[:, None]))
    return log_z, kl, e


def _teacher_buckets(
    cached: CachedTeacher, part: slice, dtype: torch.dtype, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Ids (rows, K) and log-probabilities (rows, K + 1) of the cached entries and the rest bucket."""
    floor = LOG_REST_FLOOR if divergence is reverse_kl else LOG_P_FLOOR
    log_p = cached.log_probs[part].to(dtype)
    mass = log_p.exp().sum(-1, keepdim=True)
    log_p = log_p - mass.clamp_min(1).log()  # rounding to float16 may push the sum over one
    log_p = torch.where(log_p <= LOG_P_FLOOR + 1, floor, log_p)  # what fills a row is as empty as an empty rest
    rest = (1 - mass).clamp_min(0).log().clamp_min(floor)  # an empty rest: no mass, but finite
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
    ids, log_p = _teacher_buckets(cached, part, student.dtype, divergence)
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
