"""Fused optimizers where they are really there: NVIDIA's apex, else PyTorch's own fused variant on CUDA."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.modules.fused_norm import FUSED_ADAM, nvidia_apex

ADAMW = "torch.optim.AdamW"


def fused_optimizer(optimizer: DictConfig, trainer: DictConfig) -> DictConfig:
    """AdamW's fused variant on CUDA; other optimizers, and settings that say otherwise, stay as they are.

    Left out with float16, where Lightning leaves it to a fused optimizer to unscale the gradients, after they were
    clipped; and with mixed precision and clipping by value, which Lightning refuses. (The model clips by norm itself.)

    Args:
        optimizer: of the configuration.
        trainer: its precision and clipping.
    """
    precision = str(trainer.get("precision", "32-true"))
    by_value = bool(trainer.get("gradient_clip_val")) and trainer.get("gradient_clip_algorithm") == "value"
    if precision in ("16", "16-mixed") or (by_value and precision in ("bf16", "bf16-mixed")):
        return optimizer
    if optimizer._target_ != ADAMW or "fused" in optimizer or "foreach" in optimizer or not torch.cuda.is_available():
        return optimizer
    own: dict[str, Any] = {str(k): v for k, v in OmegaConf.to_container(optimizer).items()}  # type: ignore[union-attr]
    if nvidia_apex():
        return OmegaConf.create(own | {"_target_": FUSED_ADAM, "adam_w_mode": True})
    return OmegaConf.create(own | {"fused": True})
