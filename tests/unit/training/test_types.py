"""``auto``: bfloat16 where the machine computes faster in it; what it was stands in the run's configuration."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_mtbi import config as configuration
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.process import fast_bfloat16
from nemo_mtbi.training import stages
from tests.helpers import build

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("instructions", "fast"),
    [
        ({"avx2": True, "amx_bf16": False}, False),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({}, False),
    ],
)
def test_the_machine_decides(monkeypatch, instructions, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast_bfloat16() is fast


@pytest.mark.parametrize(
    ("fast", "dtype", "precision"), [(True, "bfloat16", "bf16-mixed"), (False, "float32", "32-true")]
)
def test_auto_becomes_a_type(tiny_config, monkeypatch, fast, dtype, precision):
    for module in (configuration, stages):
        monkeypatch.setattr(module, "fast_bfloat16", lambda: fast)
    model = build(tiny_config, llm_dtype="auto")
    assert next(model.llm.parameters()).dtype == getattr(torch, dtype) and model.cfg.llm_dtype == dtype
    trainer = {"precision": "auto"}
    cfg = OmegaConf.create(
        {"model": tiny_config | {"llm_dtype": "auto"}, "trainer": trainer, "alignment_stage": {"trainer": trainer}}
    )
    stages.choose_types(cfg, configuration.model_config(cfg.model))
    assert cfg.trainer.precision == cfg.alignment_stage.trainer.precision == precision and cfg.model.llm_dtype == dtype


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_trained_weights_stay_in_float32(tiny_config, precision):
    for own, alignment in (({"precision": precision}, {}), ({}, {"trainer": {"precision": precision}})):
        cfg = OmegaConf.create({"model": tiny_config, "trainer": own, "alignment_stage": alignment})
        with pytest.raises(ConfigError, match=f"trainer.precision={precision} keeps the trained weights in half"):
            stages.choose_types(cfg, configuration.model_config(cfg.model))


def test_other_words_are_refused(tiny_config):
    with pytest.raises(ConfigError, match="llm_dtype='half': use float32, bfloat16 or auto"):
        configuration.model_config(tiny_config | {"llm_dtype": "half"})


def test_given_types_stay(tiny_config, monkeypatch):
    monkeypatch.setattr(stages, "fast_bfloat16", lambda: True)
    cfg = OmegaConf.create({"model": tiny_config, "trainer": {"precision": "32-true"}, "alignment_stage": {}})
    stages.choose_types(cfg, configuration.model_config(cfg.model))
    assert cfg.trainer.precision == "32-true" and cfg.model.llm_dtype == "float32"
