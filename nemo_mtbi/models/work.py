"""What the LLM computes in training steps, counted on the host: for the FLOP/s and MFU of a run."""

from typing import Any

import torch

from nemo_mtbi.modules.causal_lm import causal_lm, used_and_trained

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
            layers, head = lm.model.layers.parameters(), [lm.lm_head.weight]
            self._sizes = used_and_trained(layers, lm.config), used_and_trained(head, lm.config)
        for (used, trained), rows in zip(self._sizes, (positions, tokens), strict=True):
            self.flops += PRODUCT * rows * (2 * used + trained if torch.is_grad_enabled() else used)

    def taken(self) -> float:
        """FLOPs since the last call."""
        flops, self.flops = self.flops, 0.0
        return flops
