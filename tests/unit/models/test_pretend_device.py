"""CUDA without a GPU: every connector's training step, validation and generation on a pretend device."""

import pytest
import torch

from nemo_mtbi.modules.causal_lm import causal_lm
from tests.helpers import make_batch
from tests.pretend_device import GPU, OnGPU, PretendGPU, pretend_gpu
from tests.unit.models.test_long_audio import ADAPTERS, long_model

pytestmark = pytest.mark.unit
# What the CPU waits for in a step: lengths of the audio, and centers of the connector's positions. A connector that
# writes text has to be read, and Whisper's decoder asks in every eighth step whether it has come to an end.
WAITS = {"dense": 2, "stack": 2, "ctc": 5, "decoder": 16, "two_channel": 16}
KERNELS = {"dense": 200, "stack": 200, "ctc": 300, "decoder": 4000, "two_channel": 4000}


@pytest.fixture
def on_gpu(tiny_config, monkeypatch):
    def make(name):
        model = long_model(tiny_config, name)
        monkeypatch.setattr(type(model), "device", property(lambda self: GPU))
        return model, pretend_gpu(model, lambda: [causal_lm(model.llm).model, model.perception.encoder])

    return make


def moved(batch):
    return {key: OnGPU(value) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@pytest.mark.parametrize(
    ("name", "terms"), [*((name, {}) for name in ADAPTERS), ("dense", {"w_align": 0.5}), ("ctc", {"w_ctc": 0.5})]
)
def test_a_step_waits_seldom_and_starts_few_kernels(on_gpu, tiny_config, name, terms):
    tiny_config["imitation"] = {**tiny_config.get("imitation", {}), **terms}
    plain = long_model(tiny_config, name).train()
    expected = plain.training_step(make_batch(plain, 3), 0)["loss"]
    model, gpu = on_gpu(name)
    batch = make_batch(model, 3)
    model.train()
    with gpu as gpu:
        for step in range(2):  # the second finds the prompts' beginnings
            gpu.reset()
            model.zero_grad()
            loss = model.training_step(moved(batch), step)["loss"]
            kernels = sum(gpu.kernels.values())
            if step == 0 and name in ("dense", "stack"):
                assert float(loss.detach().data_on_cpu) == pytest.approx(float(expected), rel=1e-5)
                gpu.reset()
            loss.backward()
            waits = dict(gpu.waits)
    assert sum(waits.values()) <= WAITS[name], waits
    assert kernels <= KERNELS[name] + 100 * bool(terms), gpu.kernels.most_common(12)  # CTC masks frames of its own
    trained = [p for p in model.perception.modality_adapter.parameters() if p.requires_grad]
    assert any(isinstance(p.grad, OnGPU) and bool(p.grad.data_on_cpu.any()) for p in trained)


@pytest.mark.parametrize("name", ["dense", "ctc", "two_channel"])
@torch.no_grad()
def test_validation_and_generation_run_on_the_device(on_gpu, name):
    model, gpu = on_gpu(name)
    batch = make_batch(model, 2)
    audio = torch.zeros(16_000)
    with gpu:
        model.on_validation_epoch_start()
        found = model.validation_step({"held_out": moved(batch)}, 0)
        answers = model.answer(moved(batch), 3)
        spoken = model.chat(audio, "What?", max_new_tokens=3, do_sample=False)
    assert found is None and len(answers) == 2 and isinstance(spoken, str)


def test_the_device_refuses_to_mix_and_counts():
    with PretendGPU() as gpu:
        there = torch.ones(3).to("cuda")
        assert there.device == GPU and sum(gpu.waits.values()) == 1
        with pytest.raises(RuntimeError, match="add: expected all tensors on cuda:0"):
            there + torch.ones(3)
        assert (there + 1).tolist() == [2.0] * 3 and sum(gpu.waits.values()) == 2
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert sum(gpu.waits.values()) == 2
        assert there[there > 0].sum().item() == 3.0 and sum(gpu.waits.values()) == 4
        assert torch.zeros(2, device="cuda").cpu().device.type == "cpu"
        assert gpu.kernels["add"] == 1
