"""What a run shows while it trains."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from nemo_mtbi.models.work import Work
from nemo_mtbi.modules.causal_lm import used_and_trained
from nemo_mtbi.training.data_module import Waited
from nemo_mtbi.training.monitor import SampleAnswers, Throughput, peak_flops
from tests.helpers import build, make_batch

pytestmark = pytest.mark.unit


def test_answers_reach_tensorboard_wandb_and_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    board = TensorBoardLogger(tmp_path, name="board")
    wandb = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    answers = SampleAnswers(tmp_path, count=1, max_new_tokens=4)
    row = {
        "step": 2,
        "set": "held_out",
        "id": "u",
        "task": "about",
        "prompt": "about-01",
        "transcript": "a | b",
        "teacher": "It is about\nb.",
        "answer": "It is about a.",
    }
    answers._rows = [row]
    trainer = SimpleNamespace(is_global_zero=True, loggers=[board, wandb], global_step=2)
    answers.on_validation_end(trainer, None)
    wandb.experiment.finish()
    board.finalize("success")
    events = EventAccumulator(board.log_dir)
    events.Reload()
    (text,) = events.Tensors("answers/text_summary")
    assert r"| about | a \| b | It is about b. | It is about a. |" in text.tensor_proto.string_val[0].decode()
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [list(row.values())]
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [row]


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


def test_a_mixture_of_experts_counts_those_that_a_position_goes_to():
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 24}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1, "vocab_size": 50, "hidden_size": 16}
    llm = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **experts)).requires_grad_(False)
    work, layer = Work(), llm.model.layers[0]
    with torch.no_grad():
        work.add(llm, 6, 0)
    attention = sum(p.numel() for p in layer.self_attn.parameters() if p.ndim == 2)
    chosen = 2 * 3 * 16 * 24  # gate, up and down of two experts
    assert work.taken() == 2 * 6 * (attention + chosen + 16 * 8)  # and the router
    used, trained = used_and_trained(llm.model.layers.parameters(), llm.config)
    assert (used, trained) == (attention + chosen + 16 * 8, 0)
    assert used_and_trained(llm.requires_grad_(True).model.layers.parameters(), llm.config) == (used, used)


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

    def slowly():
        for _ in range(2):
            time.sleep(0.05)
            yield batch

    logger, waited = SimpleNamespace(log_metrics=lambda values, step: logged.append(values)), Waited(slowly())
    data = SimpleNamespace(waited=waited)
    trainer = SimpleNamespace(log_every_n_steps=2, loggers=[logger], global_step=1, datamodule=data)
    monitor = Throughput()
    monitor.on_train_start(trainer, model)
    begin = time.monotonic()
    for index, given in enumerate(waited):
        model.student(given, interleave=False)
        monitor.on_train_batch_end(trainer, model, None, given, index)
    seconds = time.monotonic() - begin
    (rates,) = logged
    tokens = sum(len(e.prompt_ids) + len(e.response_ids) for e in batch["examples"])
    assert rates["tokens_per_second"] == pytest.approx(rates["examples_per_second"] * tokens / 3)
    assert waited.seconds / seconds <= rates["data_wait_fraction"] <= 1 and waited.seconds >= 0.1
    assert rates["llm_tflops"] > 0 and rates["peak_memory_gib"] > 0.1
    assert "mfu" not in rates and peak_flops(torch.device("cpu"), torch.float32) is None
