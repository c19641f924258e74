"""Alignment objectives of the connector: CTC on LLM tokens, and word-level pooled embeddings. Both are sums.

Letters: B utterances, P CTC frames, V_ctc tokens, W words, H LLM width.
"""

import torch
from torch import Tensor

from nemo_mtbi.io.transfer import to_device


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: list[list[int]]) -> tuple[Tensor, int]:
    """CTC (Graves et al. 2006), blank = class 0, summed; utterances too short for their targets contribute zero.

    Args:
        log_probs: (B, P, V_ctc + 1).
        lengths: (B,) valid frames.
        targets: classes (1-based) of each utterance.

    Returns:
        The sum over utterances and the number of target tokens.
    """
    flat = to_device([c for t in targets for c in t], log_probs.device, torch.long)
    sizes = to_device([len(t) for t in targets], log_probs.device, torch.long)
    loss = torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1), flat, lengths, sizes, blank=0, reduction="sum", zero_infinity=True
    )
    return loss, int(flat.numel())


def word_alignment_loss(speech: Tensor, text: Tensor, energy: float) -> Tensor:
    """Sum over words of the squared distance of pooled speech and text embeddings, in units of the embeddings' energy.

    Args:
        speech: (W, H) mean of each word's speech embeddings.
        text: (W, H) mean of each word's token embeddings.
        energy: mean square of the LLM's embedding table; a constant, so that the sum does not depend on the batch.
    """
    return (speech - text).square().mean(-1).sum() / max(energy, 1e-8)
