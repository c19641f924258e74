"""Check that an exported model computes what the original does."""

from typing import Any

import torch

PROBE_SECONDS = 1.5


@torch.no_grad()
def max_abs_logit_difference(model: Any, other: Any) -> float:
    """Largest absolute difference of the next-token logits of two models on a seeded noise probe with a text prompt."""
    generator = torch.Generator().manual_seed(0)
    samples = round(PROBE_SECONDS * model.sampling_rate)
    audio, length = 0.1 * torch.randn(1, samples, generator=generator), torch.tensor([samples])
    logits = []
    for each in (model.eval(), other.eval()):
        pieces, _ = each.prompt_pieces([[each.user_turn("What is this about?")]])
        inputs, _ = each.generation_inputs(pieces, audio, length)
        hidden = each.hidden(inputs)
        logits.append(each.head().logits(hidden[:, -1]))
    return float((logits[0] - logits[1]).abs().max())
