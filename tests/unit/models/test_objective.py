"""What is summed into the loss."""

import copy
from dataclasses import replace

import pytest
import torch

from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.objective import losses_of_answers, step_loss, sums_by_task
from nemo_mtbi.models.validation import ValidationSums
from nemo_mtbi.modules.perception import connector_of
from nemo_mtbi.training.data_module import WindowedLoader
from tests.helpers import assert_same, build, gradients, make_batch, split

pytestmark = pytest.mark.unit


def test_sums_by_task_add_up(tiny_config):
    model = MTBISALM(copy.deepcopy(tiny_config)).eval()
    batch = make_batch(model, 4)
    student = model.student(batch, interleave=False)
    loss = model.imitation(batch, student)
    by_task = sums_by_task(batch["examples"], student.layout, loss, model.config.imitation)
    sums = torch.stack(list(by_task.values())).sum(0)
    tokens = len(loss.agreed)
    assert sums.tolist() == pytest.approx([float(loss.loss), float(loss.agreed.sum()), tokens, tokens], rel=1e-4)


def test_answers_weigh_alike_whatever_their_length(tiny_config):
    """Mean over answers of the mean loss of their tokens, against the losses of tokens; validation shows the same."""
    config = copy.deepcopy(tiny_config)
    config["imitation"] = {"w_ce": 0.5, "w_kl": 1.0, "task_weights": {"short": 3.0}}
    model = MTBISALM(config).eval()
    batch = make_batch(model, 5)
    batch["examples"] = [
        replace(e, task="short" if i % 2 else "long", response_ids=e.response_ids * (1 if i % 2 else 5))
        for i, e in enumerate(batch["examples"])
    ]
    student = model.student(batch, interleave=False)
    plain = model.imitation(batch, student)
    answers = [part.mean() for part in plain.per_token.split(student.layout.response_counts)]
    model.config.imitation.mean_over = "answers"
    loss = model.imitation(batch, student)
    step = step_loss(batch, student, loss, None, model.config.imitation)
    expected = float(sum(answers) / 5)
    assert float(step.total) / step.count == pytest.approx(expected, rel=1e-5)
    assert float(step.metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(step.metrics["kl"]) == pytest.approx(float(plain.kl) / len(plain.agreed), rel=1e-5)
    assert float(step.metrics["loss_by_task/long"]) == pytest.approx(float(sum(answers[::2]) / 3), rel=1e-5)
    assert losses_of_answers(loss, student.layout.response_counts, model.config.imitation).tolist() == pytest.approx(
        [float(a) for a in answers], rel=1e-5
    )
    logged = {}
    sums = ValidationSums()
    sums.add("one", loss, sums_by_task(batch["examples"], student.layout, loss, model.config.imitation))
    sums.log(lambda name, value, **_: logged.update({name: value}), True, torch.device("cpu"), None)
    assert logged["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["val_loss_by_task/long"] == pytest.approx(float(sum(answers[::2]) / 3), rel=1e-5)
    assert logged["val_agreement"] == pytest.approx(float(plain.agreed.float().mean()), rel=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("sizes", [[4, 4], [1] * 8])
def test_a_mean_over_answers_does_not_depend_on_how_a_batch_is_cut(tiny_config, sizes):
    tiny_config["perception"]["modality_adapter"] = {
        "_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector",
        "vocab_size": 60,
        "d_model": 32,
        "heads": 4,
        "dropout": 0.0,
    }
    model = build(tiny_config, imitation={"mean_over": "answers", "w_ctc": 0.5})
    model.perception.modality_adapter.set_vocabulary(list(range(100, 160)))
    batch = make_batch(model, 8)
    whole = gradients(model, [batch])
    parts = list(WindowedLoader(split(batch, sizes), len(sizes), connector_of(model.perception)))
    assert_same(gradients(model, parts), whole)
    model.config.imitation.mean_over = "tokens"
    other = gradients(model, [batch])
    assert any(not torch.allclose(other[name], whole[name], rtol=1e-2) for name in whole)
