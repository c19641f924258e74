"""The expected risk of hypotheses against its own definition by autograd."""

import pytest
import torch

from nemo_mtbi.losses.risk import expected_risk

pytestmark = pytest.mark.unit


def test_slopes_are_autograds():
    generator = torch.Generator().manual_seed(0)
    log_probs = (3 * torch.randn(4, 5, generator=generator)).requires_grad_()
    risks = torch.rand(4, 5, generator=generator)
    probabilities = log_probs.exp()
    plain = (probabilities / probabilities.sum(1, keepdim=True) * risks).sum(1)
    plain.sum().backward()
    expected, slopes = expected_risk(log_probs.detach(), risks)
    torch.testing.assert_close(expected, plain.detach())
    torch.testing.assert_close(slopes, log_probs.grad)


def test_equal_risks_teach_nothing_and_unlikely_texts_do_not_overflow():
    expected, slopes = expected_risk(torch.tensor([[-5.0, -900.0]]), torch.tensor([[0.7, 0.7]]))
    assert float(expected) == pytest.approx(0.7) and float(slopes.abs().max()) < 1e-6
