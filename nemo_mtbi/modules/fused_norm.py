"""RMSNorm layers of a frozen LLM as one kernel each: Transformer Engine's, NVIDIA apex's, or PyTorch's own."""

import logging
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


FUSED_ADAM = "apex.optimizers.FusedAdam"


@lru_cache
def nvidia_apex() -> bool:
    """Whether NVIDIA's apex with its CUDA kernels is installed; ``apex`` on PyPI is an unrelated web toolkit."""
    if find_spec("apex") is None:
        return False
    if find_spec("amp_C") is not None:  # the extension module that NVIDIA's apex builds
        return True
    log.warning(
        "The installed package 'apex' is not NVIDIA's, or was built without its CUDA kernels; it is not used. "
        "Build https://github.com/NVIDIA/apex from source for its fused optimizer and norms."
    )
    return False


def rms_norm_class() -> Any:
    """The fastest RMSNorm that is really there: (width, eps=...) -> module with a ``weight``."""
    if torch.cuda.is_available():
        if find_spec("transformer_engine") is not None:
            from transformer_engine.pytorch import RMSNorm

            return RMSNorm
        if nvidia_apex():
            from apex.normalization import FusedRMSNorm

            return FusedRMSNorm
    return nn.RMSNorm


def fuse_norms(llm: nn.Module) -> int:
    """Replace the RMSNorms of a frozen LLM, keeping their weights and names. -> how many.

    Left alone are norms that do something else with their weight (Gemma's add 1 to it) or have no ``variance_epsilon``.
    The fused ones multiply by the weight before they round to the model's type, Transformers' ones after.
    """
    kind, count = rms_norm_class(), 0
    for parent in list(llm.modules()):
        for name, norm in list(parent.named_children()):
            if not type(norm).__name__.endswith("RMSNorm") or not hasattr(norm, "variance_epsilon"):
                continue
            weight = norm.get_parameter("weight")
            fused = kind(len(weight), eps=norm.variance_epsilon)
            fused.weight = weight
            setattr(parent, name, fused)
            count += 1
    return count
