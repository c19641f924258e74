"""Optimizer states spread over two ranks: the same steps, and the same checkpoints, as on one."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from nemo_mtbi.config import ParameterGroupConfig
from nemo_mtbi.models.optimization import build_optimizer, moments_of
from nemo_mtbi.parallel.sharded_optimizer import ShardedOptimizer, local_optimizer
from tests.launching import on_ranks

pytestmark = pytest.mark.distributed
STEPS = 3


def parts(layers):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(layers)))


def built(layer, shard, options, moments=None):
    """As a model builds it: two parameter groups, the moments of an earlier stage."""
    model = SimpleNamespace(
        named_parameters=layer.named_parameters,
        cfg=OmegaConf.create({"optimizer": {"lr": 0.1, **options}}),
        config=SimpleNamespace(
            shard_optimizer=shard, parameter_groups=[ParameterGroupConfig(r"0\.weight", lr=0.05, weight_decay=0.3)]
        ),
        earlier_moments=lambda: moments or {},
        data_parallel_group=lambda: None,
    )
    return build_optimizer(model)["optimizer"]


def step(layer, optimizer, seed):
    optimizer.zero_grad()
    layer(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


def trained(layer, optimizer, begin=0):
    for seed in range(begin, begin + STEPS):
        step(layer, optimizer, seed)
    return copy.deepcopy(layer.state_dict())


def spread(rank, folder, layers, options, results):
    """Steps, their states as a checkpoint and as an earlier stage's moments, and further steps from either."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/joined", rank=rank, world_size=2)
    layer = parts(layers)
    optimizer = built(layer, True, options)
    assert isinstance(optimizer, ShardedOptimizer)
    first = trained(layer, optimizer)
    kept = len(local_optimizer(optimizer).state)
    moments = moments_of(optimizer, list(layer.named_parameters()))
    optimizer.consolidate_state_dict()
    box = [optimizer.state_dict() if rank == 0 else None, moments]
    dist.broadcast_object_list(box)  # every rank reads the checkpoint
    further = []
    for state, earlier in ((box[0], None), (None, box[1])):
        again = parts(layers)
        again.load_state_dict(first)
        following = built(again, True, options, copy.deepcopy(earlier))
        if state is not None:
            following.load_state_dict(copy.deepcopy(state))
        further.append(trained(again, following, STEPS))
    results[rank] = {"first": first, "further": further, "kept": kept, "moments": moments, "state": box[0]}
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (2, {"_target_": "torch.optim.AdamW", "weight_decay": 0.1}),
        (2, {"_target_": "torch.optim.AdamW", "fused": True}),
        (1, {"_target_": "torch.optim.Adam"}),
    ],
)
def test_steps_and_checkpoints_are_those_of_one_rank(tmp_path, layers, options):
    own = on_ranks(2, spread, str(tmp_path), layers, options)
    layer = parts(layers)
    optimizer = built(layer, False, options)
    named = list(layer.named_parameters())
    first, state = trained(layer, optimizer), copy.deepcopy(optimizer.state_dict())
    moments = moments_of(optimizer, named)
    last = trained(layer, optimizer, STEPS)
    assert sum(result["kept"] for result in own) == len(named) and all(result["kept"] < len(named) for result in own)
    for result in own:
        torch.testing.assert_close(result["first"], first)
        for further in result["further"]:
            torch.testing.assert_close(further, last)
    torch.testing.assert_close(own[0]["moments"], moments)
    assert own[1]["moments"] == {}
    torch.testing.assert_close(own[0]["state"]["state"], state["state"])
    alone = parts(layers)  # a checkpoint of two ranks, on one
    alone.load_state_dict(first)
    following = built(alone, False, options)
    following.load_state_dict(own[0]["state"])
    torch.testing.assert_close(trained(alone, following, STEPS), last)


def test_one_process_has_nothing_to_spread():
    layer = parts(1)
    assert type(built(layer, True, {"_target_": "torch.optim.AdamW"})) is torch.optim.AdamW
