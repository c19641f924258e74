"""What a run logs of its speed."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemo_mtbi.training.monitor import Throughput, peak_flops
from tests.helpers import build, make_batch

pytestmark = pytest.mark.unit


@pytest.mark.parity
@pytest.mark.parametrize("packing", [True, False])
def test_flops_are_those_that_pytorch_counts(tiny_config, packing):
    """Matrix products of the LLM, forward and backward; the step's others are taken off by counting them alone."""
    model = build(tiny_config, packing=packing, prefix_cache_tokens=0, imitation={"teacher": "none", "w_kl": 0.0})
    batch = make_batch(model, 5)
    student = model.student(batch, interleave=False)
    spoken = student.spoken
    spoken.embeddings.embeddings = spoken.embeddings.embeddings.detach().requires_grad_()
    model.work.taken()
    with FlopCounterMode(display=False) as counted:
        loss = model.imitation(batch, model.answering(batch["examples"], spoken)).loss
        loss.backward()
    products = sum(
        n for op, n in counted.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    assert model.work.taken() == pytest.approx(products, rel=1e-6)
    with torch.no_grad():
        model.answering(batch["examples"], spoken)
    forward = model.work.taken()
    assert forward == pytest.approx(products / 2, rel=1e-6) and model.work.taken() == 0


def test_an_online_teacher_works_too(tiny_config):
    model = build(tiny_config)
    batch = make_batch(model, 5)
    model.student(batch, interleave=False)
    student = model.work.taken()
    model.teacher_hidden(batch)
    assert 0 < model.work.taken() < student


def test_a_rank_logs_its_rates(tiny_config):
    model = build(tiny_config)
    batch, logged = make_batch(model, 3), []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append(values))
    trainer = SimpleNamespace(log_every_n_steps=2, loggers=[logger], global_step=1)
    monitor = Throughput()
    monitor.on_train_start(trainer, model)
    for index in range(2):
        time.sleep(0.05)  # the loader
        monitor.on_train_batch_start(trainer, model, batch, index)
        model.student(batch, interleave=False)
        time.sleep(0.05)
        monitor.on_train_batch_end(trainer, model, None, batch, index)
    (rates,) = logged
    tokens = sum(len(e.prompt_ids) + len(e.response_ids) for e in batch["examples"])
    assert rates["tokens_per_second"] == pytest.approx(rates["examples_per_second"] * tokens / 3)
    assert 0.1 < rates["data_wait_fraction"] < 0.6 and rates["llm_tflops"] > 0 and rates["peak_memory_gib"] > 0.1
    assert "mfu" not in rates and peak_flops(torch.device("cpu"), torch.float32) is None
