"""What the LLM computes in training steps, counted on the host: for the FLOP/s and MFU of a run."""

from collections.abc import Iterable
from typing import Any

import torch

from nemo_mtbi.modules.causal_lm import causal_lm

# A product of a weight and a position takes 2 FLOPs; in the backward pass one more product gives the gradient of the
# input, and one that of a trained weight.
PRODUCT = 2


class Work:
    """Matrix products of an LLM's layers and output layer; of a tensor-parallel rank, its own share.

    Attention itself, the encoder and the connector are left out, and so are activations that are computed again (as in
    the usual definition of MFU, arXiv 2204.02311).
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self._sizes: tuple[tuple[float, float], tuple[float, float]] | None = None

    def add(self, llm: Any, positions: int, tokens: int) -> None:
        """A pass over so many positions, of which ``tokens`` go through the output layer."""
        if self._sizes is None:  # after the LLM has been cut
            lm = causal_lm(llm)
            self._sizes = weights(lm.model.layers.parameters(), lm.config), weights([lm.lm_head.weight], lm.config)
        for (used, trained), rows in zip(self._sizes, (positions, tokens), strict=True):
            self.flops += PRODUCT * rows * (2 * used + trained if torch.is_grad_enabled() else used)

    def taken(self) -> float:
        """FLOPs since the last call."""
        flops, self.flops = self.flops, 0.0
        return flops


def weights(parameters: Iterable[torch.nn.Parameter], config: Any) -> tuple[float, float]:
    """Entries of the matrices that a position is multiplied with, and of those that are trained.

    Experts are kept together in three dimensions; a position goes to some of them.
    """
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    sizes = [(p.numel() * (share if p.ndim == 3 else 1), p.requires_grad) for p in parameters if p.ndim in (2, 3)]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
