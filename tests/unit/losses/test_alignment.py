"""Alignment losses against PyTorch."""

import pytest
import torch

from nemo_mtbi import registration as registration
from nemo_mtbi.losses.alignment import ctc_loss, word_alignment_loss

pytestmark = pytest.mark.unit


def test_alignment_losses():
    log_probs = torch.full((1, 5, 4), -10.0)
    log_probs[0, range(5), [1, 1, 0, 2, 3]] = 0.0
    good, count = ctc_loss(log_probs.log_softmax(-1), torch.tensor([5]), [[1, 2, 3]])
    bad, _ = ctc_loss(log_probs.log_softmax(-1), torch.tensor([5]), [[3, 2, 1]])
    assert count == 3 and float(good) < 0.1 < float(bad)
    impossible, _ = ctc_loss(log_probs.log_softmax(-1), torch.tensor([5]), [[1] * 9])
    assert float(impossible) == 0
    text = torch.randn(6, 8)
    assert float(word_alignment_loss(text, text, 1.0)) == 0
    whole = float(word_alignment_loss(torch.zeros(6, 8), text, 0.5))
    parts = sum(float(word_alignment_loss(torch.zeros(3, 8), t, 0.5)) for t in text.split(3))
    assert whole == pytest.approx(parts) == pytest.approx(float(text.square().mean(-1).sum()) / 0.5)
