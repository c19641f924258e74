"""Fused optimizers where they are really there: NVIDIA's apex, else PyTorch's own fused variant on CUDA."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.modules.fused_norm import nvidia_apex

ADAMW = "torch.optim.AdamW"


def fused_optimizer(optimizer: DictConfig, precision: str) -> DictConfig:
    """AdamW's fused variant on CUDA; other optimizers, and settings that say otherwise, stay as they are.

    With mixed ``precision`` Lightning refuses to clip gradients of a fused optimizer, so there it is left out.
    """
    if precision.endswith("-mixed"):
        return optimizer
    if optimizer._target_ != ADAMW or "fused" in optimizer or "foreach" in optimizer or not torch.cuda.is_available():
        return optimizer
    own: dict[str, Any] = {str(k): v for k, v in OmegaConf.to_container(optimizer).items()}  # type: ignore[union-attr]
    if nvidia_apex():
        return OmegaConf.create(own | {"_target_": "apex.optimizers.FusedAdam", "adam_w_mode": True})
    return OmegaConf.create(own | {"fused": True})
