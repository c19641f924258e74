"""Fused optimizers where they are really there: NVIDIA's apex, else PyTorch's own fused variant on CUDA."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

ADAMW = "torch.optim.AdamW"


@lru_cache
def nvidia_apex() -> bool:
    """Whether NVIDIA's apex with its CUDA kernels is installed; ``apex`` on PyPI is an unrelated web toolkit."""
    if find_spec("apex") is None:
        return False
    if find_spec("amp_C") is not None:  # the extension module that NVIDIA's apex builds
        return True
    logging.warning(
        "The installed package 'apex' is not NVIDIA's, or was built without its CUDA kernels; it is not used. "
        "Build https://github.com/NVIDIA/apex from source for its fused optimizer."
    )
    return False


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
