"""Check that an exported model computes what the original does."""

from typing import Any

import torch

from nemo_mtbi.errors import CheckpointError

PROBE_SECONDS = 1.5
TOLERANCE = 0.01  # of the largest logit
MERGED = {torch.bfloat16: 0.05}  # where weights that are added up are rounded to fewer bits


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """Next-token logits (1, V) of a model on a seeded noise probe with a text prompt."""
    generator = torch.Generator().manual_seed(0)
    samples = round(PROBE_SECONDS * model.sampling_rate)
    audio, length = 0.1 * torch.randn(1, samples, generator=generator), torch.tensor([samples])
    pieces, _ = model.eval().prompt_pieces([[model.user_turn("What is this about?")]])
    inputs, _ = model.generation_inputs(pieces, audio, length)
    return model.head().logits(model.hidden(inputs)[:, -1])


def max_abs_logit_difference(model: Any, other: Any) -> float:
    """Largest absolute difference of the :func:`probe_logits` of two models."""
    return float((probe_logits(model) - probe_logits(other)).abs().max())


def require_same_logits(own: torch.Tensor, other: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    """The largest absolute difference of two models' logits.

    Raises:
        CheckpointError: it is no number, or above ``tolerance`` of the largest logit.
    """
    difference, largest = float((own - other).abs().max()), float(own.abs().max())
    if not difference <= tolerance * largest:  # neither where one is not a number
        raise CheckpointError(
            f"{what}: the logits differ by {difference:.3g}, where the largest is {largest:.3g}. Do not use it; look "
            "at the weights (not finite?) and at the types (model.llm_dtype)."
        )
    return difference
