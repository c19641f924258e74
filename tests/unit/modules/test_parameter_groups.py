"""Learning rates by pattern, and moments that go on."""

import copy
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import WhisperModel

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.config import ParameterGroupConfig, model_config
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models import MTBISALM, setup
from nemo_mtbi.models.optimization import build_optimizer, continue_moments, moments_of
from nemo_mtbi.models.setup import language_model_tokenizer, outline
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


CONNECTORS = {
    "StackMLPConnector": {"factor": 5, "hidden_dim": 32},
    "CTCCompressConnector": {"vocab_size": 9, "d_model": 32, "heads": 4},
    "WhisperDecoderConnector": {},
    "TwoChannelConnector": {"acoustic_strides": 2},
    "description": {
        "_target_": "nemo_mtbi.modules.connectors.TwoChannelConnector",
        "acoustic_prompt": " A {low|high} voice.",
    },
}
LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}


def with_connector(config, name, **changes):
    adapter = {"_target_": f"nemo_mtbi.modules.connectors.{name}", **CONNECTORS[name]}
    return {**config, "perception": {"input_length": "own", "modality_adapter": adapter}, **changes}


def outlined(config):
    return outline(config, model_config(config), language_model_tokenizer(model_config(config)))


def described(parameters):
    return [(n, tuple(p.shape), p.requires_grad) for n, p in parameters]


@pytest.mark.parametrize(("name", "lora"), [*((name, None) for name in CONNECTORS), ("TwoChannelConnector", LORA)])
def test_the_outline_has_the_parameters_of_the_model_and_no_weights(tiny_config, name, lora):
    config = with_connector(copy.deepcopy(tiny_config), name, **({"lora": lora} if lora else {}))
    drawn = torch.get_rng_state()
    parts = outlined(config)
    assert torch.equal(torch.get_rng_state(), drawn) and all(p.is_meta for p in parts.parameters())
    assert sorted(described(parts.named_parameters())) == sorted(described(build(config).named_parameters()))


def test_the_outline_of_a_model_with_nemos_encoder(tiny_config, nemo_asr):
    config = with_connector(copy.deepcopy(tiny_config), "StackMLPConnector", pretrained_asr=nemo_asr)
    config["perception"].pop("input_length")
    parts = outlined(config)
    assert sorted(described(parts.named_parameters())) == sorted(described(build(config).named_parameters()))


@pytest.mark.parametrize("name", ["StackMLPConnector", "TwoChannelConnector"])
@pytest.mark.parametrize("pattern", ["perception.modality_adapter.accoustic", "llm.", "perception.encoder"])
def test_a_pattern_that_matches_nothing_is_refused_before_any_weight_is_loaded(tiny_config, name, pattern, monkeypatch):
    def load(*_):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(setup, "load_pretrained_hf", load)
    monkeypatch.setattr(WhisperModel, "from_pretrained", load)
    groups = [{"pattern": "perception.modality_adapter.norm", "lr": 0.1}, {"pattern": pattern, "lr": 0.2}]
    with pytest.raises(ConfigError, match=rf"'{pattern}' matches no trained parameter.*perception\.modality_adapter\."):
        MTBISALM(with_connector(copy.deepcopy(tiny_config), name, parameter_groups=groups))


def test_groups_of_a_finished_model_do_not_stop_it_from_opening(tiny_config, tmp_path):
    """Its LoRA is merged, so the pattern for it matches nothing any more."""
    groups = [{"pattern": ".*lora", "lr": 0.2}]
    model = build(copy.deepcopy(tiny_config), lora=LORA, parameter_groups=groups)
    model.merge_lora()
    assert MTBISALM.restore_from(save_directory(model, tmp_path / "merged")).config.parameter_groups


def assert_counts_where_the_optimizer_does(parts, named, moments):
    """Fused optimizers count on the parameters' device, apex's in their groups; elsewhere the count is on the CPU."""
    count = moments["weight/step"]
    for options, device in (({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")):
        away = copy.deepcopy(parts).to("meta")
        optimizer = torch.optim.AdamW(away.parameters(), 0.1)
        optimizer.param_groups[0].update(options)
        assert continue_moments(optimizer, list(away.named_parameters()), moments) == 2
        state = optimizer.state[away.weight]
        assert state["step"].device.type == device and state["exp_avg"].device.type == "meta"
    apex = type("FusedAdam", (torch.optim.AdamW,), {"__module__": "apex.optimizers.fused_adam"})(parts.parameters())
    assert continue_moments(apex, named, moments) == 2
    assert "step" not in apex.state[parts.weight] and apex.param_groups[0]["step"] == int(count) > 0
    assert moments_of(apex, named)["weight/step"] == count


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
    assert_counts_where_the_optimizer_does(parts, named, moments_of(first, named))
    other = torch.nn.Linear(5, 2)  # another shape: only the bias goes on
    fresh = torch.optim.AdamW(other.parameters(), 0.1)
    assert continue_moments(fresh, list(other.named_parameters()), moments_of(first, named)) == 1


@pytest.mark.parametrize(
    ("kind", "options", "continues"),
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.RAdam, {}, True),
        (torch.optim.AdamW, {"amsgrad": True}, False),
        (torch.optim.NAdam, {}, False),
        (torch.optim.RMSprop, {}, False),
        (torch.optim.Adafactor, {}, False),
        (torch.optim.SGD, {}, False),
    ],
)
def test_optimizers_that_keep_other_things_begin_anew(kind, options, continues):
    layer = torch.nn.Linear(3, 2)
    named, first = list(layer.named_parameters()), torch.optim.AdamW(layer.parameters(), 0.1)

    def step(optimizer):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    step(first)
    target = f"{kind.__module__}.{kind.__name__}"
    model = SimpleNamespace(
        named_parameters=lambda: iter(named),
        cfg=OmegaConf.create({"optimizer": {"_target_": target, "lr": 0.1, **options}}),
        config=SimpleNamespace(parameter_groups=[], shard_optimizer=False),
        earlier_moments=lambda: moments_of(first, named),
    )
    second = build_optimizer(model)["optimizer"]
    assert bool(second.state) == continues
    step(second)
