"""The LLM's output layer, as the losses apply it.

Letters: R rows, H hidden size, V vocabulary (V_local on a tensor-parallel rank).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_mtbi.losses.vocabulary import WHOLE_VOCABULARY, VocabularyShard


@dataclass(frozen=True)
class Head:
    """The output layer: ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``.

    Attributes:
        weight: (V, H); rows of this rank only when the vocabulary is sharded.
        bias: (V,) or None.
        scale: factor on the logits (Granite, Cohere).
        softcap: soft-capping value (Gemma 2) or None.
        shard: where the rows of ``weight`` stand in the vocabulary.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    shard: VocabularyShard = WHOLE_VOCABULARY

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (R, H) -> fp32 (fp64 for fp64) logits (R, V_local); padding rows of the vocabulary are -inf."""
        return self.shard.mask_padding(raw_logits(hidden, self.weight, self.bias, self.scale, self.softcap))


def raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Logits with padding rows as they come; fp32, fp64 for fp64."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(accumulation_dtype(hidden.dtype))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
