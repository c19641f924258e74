"""Batches over noise, and the gradients of one optimizer step, for tests of tiny models."""

import copy
from types import SimpleNamespace

import torch

from nemo_mtbi.data.example import Example
from nemo_mtbi.data.interleaving import Word, timeline
from nemo_mtbi.models import MTBISALM

SECONDS = 1.2


def build(config, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return MTBISALM(config)


def served_config(llm, whisper):
    """A tiny dense model as the endpoint's tests serve it."""
    adapter = {"_target_": "nemo_mtbi.modules.connectors.StackMLPConnector", "factor": 5, "hidden_dim": 32}
    return {
        "pretrained_llm": llm,
        "pretrained_asr": whisper,
        "prompt_format": "chat_template",
        "perception": {"input_length": "own", "round_seconds": 1.0, "modality_adapter": adapter},
    }


def make_batch(model, count, seed=0):
    """``count`` examples over noise, with prompts and answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        prompt = torch.randint(100, 4000, (9 + index % 3,), generator=generator).tolist()
        words = [Word(3 + i, 4 + i, 0.2 * i, 0.2 * i + 0.15) for i in range(4)]
        answer = [*torch.randint(100, 4000, (2 + index % 4,), generator=generator).tolist(), 2]
        examples.append(
            Example(
                f"utt{index}", 0, "repeat", f"p{index}", prompt, timeline(words, SECONDS), answer, SECONDS, "one two"
            )
        )
    audio = 0.1 * torch.randn(count, round(SECONDS * 16000), generator=generator)
    return {"examples": examples, "audios": audio, "audio_lens": torch.full((count,), audio.shape[1])}


def split(batch, sizes):
    parts, begin = [], 0
    for size in sizes:
        rows = slice(begin, begin + size)
        parts.append(
            {
                "examples": batch["examples"][rows],
                "audios": batch["audios"][rows],
                "audio_lens": batch["audio_lens"][rows],
            }
        )
        begin += size
    return parts


class OneStepTrainer:
    """What ``on_before_optimizer_step`` reads of Lightning's trainer."""

    def __init__(self, accumulate, scale=None):
        self.accumulate_grad_batches = accumulate
        self.global_step = 0
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        self.precision_plugin = SimpleNamespace(scaler=scaler)


def gradients(model, parts, scale=None):
    """Connector gradients of one optimizer step over micro-batches, as Lightning would accumulate them."""
    model.zero_grad(set_to_none=True)
    model.log = model.log_dict = lambda *args, **kwargs: None
    model._trainer = OneStepTrainer(len(parts), scale)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for part in parts:
        (model.training_step(part, 0)["loss"] / len(parts)).backward()
    model.on_before_optimizer_step(optimizer)
    model._trainer = None
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, tolerance=1e-4):
    """Every gradient within ``tolerance`` of the expected one's norm."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= tolerance * float(gradient.norm()), name


def two_channel(config, **adapter):
    """A copy of a configuration with a two-channel connector, on two layers of the encoder."""
    target = "nemo_mtbi.modules.connectors.TwoChannelConnector"
    perception = {"input_length": "own", "encoder_taps": [1]}
    return copy.deepcopy(config) | {
        "perception": perception | {"modality_adapter": {"_target_": target, "dropout": 0.0, **adapter}}
    }
