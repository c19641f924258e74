"""Files that were written by commit bf6270e, before modules moved, still open and compute the same."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from nemo_mtbi._moved import MOVED
from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.cli import CONF
from nemo_mtbi.config import model_config
from nemo_mtbi.models import MTBISALM

pytestmark = pytest.mark.parity
OLD = Path(__file__).parents[1] / "golden" / "commit_bf6270e"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def next_logits(model):
    """Of a seeded noise and a prompt, as when the files were written."""
    audio = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    pieces, _ = model.prompt_pieces([[model.user_turn(EXPECTED["prompt"])]])
    with torch.no_grad():
        inputs, _ = model.generation_inputs(pieces, audio, torch.tensor([16000]))
        return model.head().logits(model.hidden(inputs)[:, -1])[0]


@pytest.fixture
def run(tmp_path):
    """The old training run, with the places of its LLM and encoder as they are here."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    file = tmp_path / "run" / "model.json"
    record = json.loads(file.read_text())
    record["model"] |= {"pretrained_llm": str(OLD / "llm"), "pretrained_asr": str(OLD / "whisper")}
    file.write_text(json.dumps(record))
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["model.nemo", "hf"])
def test_exports(name):
    expected = torch.tensor(EXPECTED["logits"])
    torch.testing.assert_close(next_logits(MTBISALM.restore_from(OLD / name)), expected, rtol=1e-4, atol=1e-5)


def test_a_training_run_and_its_checkpoint(run):
    expected = torch.tensor(EXPECTED["logits"])
    model = MTBISALM.from_run(RunDirectory(run))
    torch.testing.assert_close(next_logits(model), expected, rtol=1e-4, atol=1e-5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    checkpoint = torch.load(OLD / "mtbi.ckpt", weights_only=True)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    torch.testing.assert_close(next_logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_launch_with_the_names_of_then():
    importlib.import_module("nemo_mtbi.examples.train")
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("train", [line for line in (OLD / "overrides.txt").read_text().splitlines() if line])
    assert model_config(cfg.model).imitation.w_ce == 0.5
    target = cfg.model.perception.modality_adapter._target_
    module, _, name = target.rpartition(".")
    assert getattr(importlib.import_module(module), name).__module__ != module  # it has moved


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_names_of_modules(old):
    with pytest.warns(DeprecationWarning, match=f"{old} is now"):
        import sys

        sys.modules.pop(old, None)
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__ is not None and module.__spec__.name == MOVED[old]
