"""Tensors of the first rank travel as they are."""

import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.parallel.launch import choose_gpu, tensors_from_first_rank
from tests.launching import on_ranks

pytestmark = pytest.mark.distributed
TENSORS = {
    "a": torch.arange(12.0).view(3, 4).t(),  # not contiguous
    "b": torch.tensor(7),
    "c": torch.tensor([True, False]),
    "d": torch.ones(2, dtype=torch.bfloat16),
    "e": torch.zeros(0, 3),
}


def worker(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)

    def load():
        assert rank == 0  # others do not see the file
        return dict(TENSORS)

    got = tensors_from_first_rank(load)
    results[rank] = [name for name in got if torch.equal(got[name], TENSORS[name])], tensors_from_first_rank(dict)
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank_gets_them():
    assert on_ranks(3, worker, 29571) == [(list(TENSORS), {})] * 3


def test_one_process_loads_them_itself():
    assert tensors_from_first_rank(lambda: TENSORS) is TENSORS


@pytest.mark.parametrize(
    "environment, chosen",
    [
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "1"}, [3]),
        ({"SLURM_LOCALID": "2"}, [2]),
        ({"SLURM_LOCALID": "9"}, []),
        ({}, []),
    ],
)
def test_a_process_takes_its_own_gpu_first(monkeypatch, environment, chosen):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    choose_gpu()
    assert taken == chosen
