"""From the CPU to a device without waiting: a step on a GPU has no host round trip but those that are counted
(``tests/unit/models/test_pretend_device.py``).
"""

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, or a tensor that lies on the CPU, on a device.

    ``torch.tensor(values, device="cuda")`` copies from memory that is not pinned, for which the CPU waits.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def all_to_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one type that lie on the CPU, in one transfer."""
    if device.type == "cpu":
        return tensors
    flat = to_device(torch.cat([t.flatten() for t in tensors]), device)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
