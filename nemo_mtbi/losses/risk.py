"""Minimum risk over a recognizer's hypotheses (Shen et al. 2016, Prabhavalkar et al. 2018).

A hypothesis is a discrete text, so the LLM's loss on it has no gradient to the recognizer; its expectation has::

    R_b = sum_s q_bs r_bs,      q_bs = P(h_bs) / sum_t P(h_bt),      dR_b = sum_s q_bs (r_bs - R_b) d log P(h_bs)

The hypotheses are the greedy text and drawn ones; a text that was drawn n times is n of them, with n times its share.

Letters: B utterances, S hypotheses of each.
"""

import torch
from torch import Tensor


def expected_risk(log_probs: Tensor, risks: Tensor) -> tuple[Tensor, Tensor]:
    """Expected risk and its gradient by the hypotheses' log-probabilities.

    Args:
        log_probs: (B, S) of the hypotheses.
        risks: (B, S).

    Returns:
        R (B,), and dR / d log P (B, S), whose rows sum to 0: equal risks teach nothing.
    """
    share = torch.softmax(log_probs.float(), 1)
    expected = (share * risks).sum(1)
    return expected, share * (risks - expected[:, None])
