"""Learning rates by pattern, and moments that go on."""

import pytest
import torch

from nemo_mtbi.config import ParameterGroupConfig
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.optimization import build_optimizer, continue_moments, moments_of
from nemo_mtbi.modules.parameter_groups import parameter_groups
from tests.helpers import build

pytestmark = pytest.mark.unit
PREFIX = "perception.modality_adapter."


def test_the_first_matching_group_wins_and_the_rest_has_the_optimizers_settings(tiny_config):
    groups = [
        {"pattern": rf"{PREFIX}.*bias", "weight_decay": 0.0},
        {"pattern": rf"{PREFIX}norm", "lr": 0.5, "weight_decay": 0.0},
    ]
    model = build(tiny_config, parameter_groups=groups, optimizer={"weight_decay": 0.1})
    optimizer = build_optimizer(model)["optimizer"]
    named = {id(p): n.removeprefix(PREFIX) for n, p in model.named_parameters()}
    found = [({named[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [
        ({"norm.bias", "mlp.0.bias", "mlp.2.bias"}, 0.1, 0.0),
        ({"norm.weight"}, 0.5, 0.0),
        ({"mlp.0.weight", "mlp.2.weight"}, 0.1, 0.1),
    ]


@pytest.mark.parametrize(
    "group, message",
    [
        ({"pattern": "(", "lr": 1.0}, "no regular expression"),
        ({"pattern": "perception"}, "sets neither"),
        ({"pattern": "perception", "lr": 1.0, "momentum": 1}, "momentum"),
    ],
)
def test_bad_groups_are_refused_before_loading(tiny_config, group, message):
    with pytest.raises(ConfigError, match=message):
        MTBISALM({**tiny_config, "pretrained_asr": "/nowhere", "parameter_groups": [group]})


def test_a_pattern_that_matches_nothing_is_named():
    named = [("a.weight", torch.nn.Parameter(torch.zeros(1)))]
    with pytest.raises(ConfigError, match=r"'b' matches no trained parameter.*a\.weight"):
        parameter_groups(named, [ParameterGroupConfig("b", lr=1.0)])


def test_moments_go_on_as_if_the_optimizer_had_not_changed():
    def start():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), 0.1)

    def step(layer, optimizer, seed):
        optimizer.zero_grad()
        layer(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    whole, own = start()
    for seed in range(4):
        step(whole, own, seed)
    parts, first = start()
    for seed in range(2):
        step(parts, first, seed)
    second = torch.optim.AdamW(parts.parameters(), 0.1)
    named = list(parts.named_parameters())
    assert continue_moments(second, named, moments_of(first, named)) == 2
    for seed in range(2, 4):
        step(parts, second, seed)
    torch.testing.assert_close(parts.weight, whole.weight)
    other = torch.nn.Linear(5, 2)  # another shape: only the bias goes on
    fresh = torch.optim.AdamW(other.parameters(), 0.1)
    assert continue_moments(fresh, list(other.named_parameters()), moments_of(first, named)) == 1
