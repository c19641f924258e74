"""Divergences between a teacher's and a student's next-token distribution over the same buckets.

A bucket is one vocabulary entry, or the "rest" of the vocabulary when the teacher is given by its top-k entries.
Letters: R rows (response tokens), K buckets.

With ``l(p, q)`` the divergence and ``a = dl / d log q``, the gradient with respect to the logits ``u`` of ``q =
softmax(u)`` is ``a - q * sum(a)``; each function below returns the row sums of ``l`` terms and the tensor ``a``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) terms. Arguments (R, K); returns (terms (R, K), a (R, K))."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0), -p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) terms. Arguments (R, K); returns (terms (R, K), a (R, K))."""
    q = log_q.exp()
    terms = torch.where(q > 0, q * (log_q - log_p), 0.0)
    return terms, terms + q


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon terms with equal weights. Arguments (R, K); returns (terms (R, K), a (R, K))."""
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    from_student = torch.where(q > 0, 0.5 * q * (log_q - log_m), 0.0)
    return torch.where(p > 0, 0.5 * p * (log_p - log_m), 0.0) + from_student, from_student


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
