"""NVIDIA's apex is told from the other package of that name."""

import sys
from types import ModuleType

import pytest
import torch
from nemo.core.classes.common import safe_instantiate
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration

pytestmark = pytest.mark.unit


def test_another_apex_is_not_taken_for_nvidias(tmp_path, monkeypatch):
    from nemo_mtbi.training.accelerators import fused_optimizer, nvidia_apex

    nvidia_apex.cache_clear()
    assert not nvidia_apex()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    nvidia_apex.cache_clear()
    assert not nvidia_apex()
    (tmp_path / "amp_C.py").write_text("")
    nvidia_apex.cache_clear()
    assert nvidia_apex()
    nvidia_apex.cache_clear()
    adam = OmegaConf.create({"_target_": "torch.optim.AdamW", "lr": 1.0})
    assert fused_optimizer(adam, OmegaConf.create()) == adam  # no CUDA here
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("nemo_mtbi.training.accelerators.nvidia_apex", lambda: False)
    for trainer, fused in (
        ({}, True),
        ({"precision": "bf16-mixed", "gradient_clip_val": 1.0}, True),
        ({"precision": "bf16-mixed", "gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, False),
        ({"precision": 16}, False),
        ({"precision": "16-mixed"}, False),
    ):
        assert fused_optimizer(adam, OmegaConf.create(trainer)).get("fused", False) == fused


def test_nemo_makes_apexs_optimizer_and_calls_none_of_its_functions(monkeypatch):
    from nemo_mtbi.training.accelerators import fused_optimizer

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, params, adam_w_mode, **options):
            super().__init__(params, **options)

    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.clip_grad_norm_ = FusedAdam, print
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("nemo_mtbi.training.accelerators.nvidia_apex", lambda: True)
    config = fused_optimizer(OmegaConf.create({"_target_": "torch.optim.AdamW", "lr": 0.5}), OmegaConf.create())
    made = safe_instantiate(config, [torch.nn.Parameter(torch.zeros(2))])
    assert isinstance(made, FusedAdam) and made.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="unsafe target"):
        safe_instantiate(OmegaConf.create({"_target_": "apex.optimizers.clip_grad_norm_"}))
