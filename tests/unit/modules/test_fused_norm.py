"""NVIDIA's apex is told from the other package of that name."""

import pytest
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
