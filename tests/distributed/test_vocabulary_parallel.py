"""The fused loss on a vocabulary spread over three processes (gloo) against one process.

No NeMo import in the workers.
"""

import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.losses.imitation import CachedTeacher, Head, ImitationObjective, imitation_loss
from nemo_mtbi.losses.vocabulary import VocabularyShard
from tests.launching import on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.parity]
R, H, V, RANKS = 11, 8, 37, 3
PADDED = 39  # 13 rows a rank; the last two of rank 2 are padding


def data():
    g = torch.Generator().manual_seed(0)
    hidden, teacher = (
        torch.randn(R, H, generator=g, dtype=torch.float64),
        torch.randn(R, H, generator=g, dtype=torch.float64),
    )
    weight = torch.zeros(PADDED, H, dtype=torch.float64)
    weight[:V] = torch.randn(V, H, generator=g, dtype=torch.float64)
    return hidden.requires_grad_(), teacher, weight, torch.randint(V, (R,), generator=g)


def loss_of(hidden, head, ids, teacher, full_weight, kind, divergence, cap):
    objective = ImitationObjective(0.7, 1.2, 1.5, divergence)
    if kind == "cached":
        z = teacher @ full_weight[:V].t()
        z = z if cap is None else cap * torch.tanh(z / cap)
        log_p, keep = (z / 1.5).log_softmax(-1).topk(6)
        return imitation_loss(hidden, head, ids, objective, cached_teacher=CachedTeacher(keep, log_p), chunk_rows=4)
    return imitation_loss(hidden, head, ids, objective, teacher_hidden=teacher, chunk_rows=4)


CASES = [
    (k, d, c) for k in ("online", "cached") for d in ("forward_kl", "reverse_kl", "jensen_shannon") for c in (None, 2.5)
]


def worker(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    size = PADDED // RANKS
    shard = VocabularyShard(rank * size, min(size, V - rank * size), dist.group.WORLD)
    out = {}
    for case in CASES:
        hidden, teacher, weight, ids = data()
        local = weight[rank * size : (rank + 1) * size].clone().requires_grad_()
        loss = loss_of(hidden, Head(local, softcap=case[2], shard=shard), ids, teacher, weight, *case)
        loss.loss.backward()
        out[case] = (loss.loss.detach(), hidden.grad, local.grad, loss.agreed)
    results[rank] = out
    dist.destroy_process_group()


def test_three_shards_equal_one():
    got = on_ranks(RANKS, worker, 29517)
    for case in CASES:
        hidden, teacher, weight, ids = data()
        whole = weight[:V].clone().requires_grad_()
        expected = loss_of(hidden, Head(whole, softcap=case[2]), ids, teacher, weight, *case)
        expected.loss.backward()
        gradient = torch.cat([got[r][case][2] for r in range(RANKS)])
        torch.testing.assert_close(gradient[:V], whole.grad, msg=lambda m, case=case: f"{case}: {m}")
        assert (gradient[V:] == 0).all()
        for rank in range(RANKS):
            loss, grad_hidden, _, agreed = got[rank][case]
            torch.testing.assert_close(loss, expected.loss.detach())
            torch.testing.assert_close(grad_hidden, hidden.grad)
            assert torch.equal(agreed, expected.agreed)
