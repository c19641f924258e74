"""What the LLM computes in training steps, counted on the host: for the FLOP/s and MFU of a run."""

from typing import Any

import torch

from nemo_mtbi.modules.causal_lm import causal_lm

# A product of a weight and a position takes 2 FLOPs; of a frozen layer, the backward pass is one more product.
FORWARD, FORWARD_BACKWARD = 2, 4


class Work:
    """Matrix products of an LLM's layers and output layer; of a tensor-parallel rank, its own share.

    Attention itself, the encoder and the connector are left out, and so are activations that are computed again (as in
    the usual definition of MFU, arXiv 2204.02311).
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self._sizes: tuple[int, int] | None = None

    def add(self, llm: Any, positions: int, tokens: int) -> None:
        """A pass over so many positions, of which ``tokens`` go through the output layer."""
        if self._sizes is None:  # after the LLM has been cut
            lm = causal_lm(llm)
            body = sum(p.numel() for p in lm.model.layers.parameters() if p.ndim == 2)
            self._sizes = body, lm.lm_head.weight.numel()
        body, head = self._sizes
        factor = FORWARD_BACKWARD if torch.is_grad_enabled() else FORWARD
        self.flops += factor * (body * positions + head * tokens)

    def taken(self) -> float:
        """FLOPs since the last call."""
        flops, self.flops = self.flops, 0.0
        return flops
