"""The training launcher on several processes (gloo) and killed at random moments, against one uninterrupted process."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch
import torch.distributed as dist
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.parallel.launch import initialize
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.generate import TargetGenerator
from tests.launching import Started, killed_until_done, on_ranks

pytestmark = pytest.mark.distributed
WORDS = "one two three four five six seven eight nine ten".split()
STEPS = 20
STRATEGY = (
    "trainer.strategy={_target_: nemo_mtbi.parallel.strategy.TensorParallelStrategy, tensor_model_parallel_size: 2}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def manifests(root, tiny_llm):
    """24 noise utterances with word-less transcripts and the tiny LLM's answers."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)
    cuts = []
    for i in range(24):
        file = root / f"{i}.wav"
        soundfile.write(file, 0.1 * rng.standard_normal(16000 + 800 * (i % 5)), 16000)
        recording = Recording.from_file(file)
        text = " ".join(rng.choice(WORDS, 4))
        supervision = SupervisionSegment(f"u{i}", recording.id, 0, recording.duration, text=text, speaker="s")
        cuts.append(MonoCut(f"u{i}", 0, recording.duration, 0, recording=recording, supervisions=[supervision]))
    CutSet(cuts).to_file(root / "cuts.jsonl")
    config = TargetsConfig(
        cuts={"train": str(root / "cuts.jsonl")},
        output_dir=str(root / "targets"),
        llm=tiny_llm,
        dtype="float32",
        task_names=["repeat", "about"],
        filters=["empty"],
        max_new_tokens=6,
        shar_dir=str(root / "shar"),
        shar_size=5,
    )
    return TargetGenerator(config).run()["train"]


@pytest.fixture(scope="module")
def overrides(manifests, tiny_llm, tiny_whisper):
    return [
        f"data.train_ds.input_cfg.0.cuts_path={manifests}",
        "data.train_ds.batch_size=4",
        "threads=1",
        f"data.validation_ds.datasets.held_out.input_cfg.0.cuts_path={manifests}",
        "data.train_ds.use_bucketing=false",
        "speech_llm@model=offline",
        f"model.pretrained_llm={tiny_llm}",
        f"model.pretrained_asr={tiny_whisper}",
        "model.llm_dtype=float32",
        "model.perception.modality_adapter.d_model=32",
        "+model.perception.modality_adapter.heads=4",
        "alignment_stage.enabled=false",
        f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=20",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "model.optimizer.lr=1e-3",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
        "model.prefix_cache_tokens=0",
    ]


def command(output, overrides, *more):
    return [sys.executable, "-m", "nemo_mtbi.examples.train", f"output_dir={output}", *overrides, *more]


def start(output, overrides, *more):
    if not any(option.startswith("trainer.devices") for option in more):
        return Started("train", command(output, overrides, *more)[3:])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(output, overrides, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    )


def train(output, overrides, *more):
    process = start(output, overrides, *more)
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out[-4000:]
    return load_file(output / "imitation" / "last.safetensors")


def train_on_ranks(output, overrides, *more, ranks):
    """As under ``torchrun``: somebody else has started the processes."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    arguments = command(output, overrides, f"trainer.devices={ranks}", *more)[3:]
    processes = [Started("train", arguments, environment=common | {"LOCAL_RANK": str(r)}) for r in range(ranks)]
    for process in processes:
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed[-4000:]
    return load_file(output / "imitation" / "last.safetensors")


def curve(output, tag="loss"):
    events = EventAccumulator(str(output / "imitation"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


@pytest.fixture(scope="module")
def whole(root, overrides):
    """One uninterrupted process; two batches a step, as two data-parallel ranks take them."""
    return train(root / "whole", overrides, "trainer.accumulate_grad_batches=2")


def assert_same(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_the_weights_that_are_kept(root, overrides, whole, tmp_path):
    """Of the best validation, or the last ones; what else is refused before anything is loaded."""
    folder = root / "whole" / "imitation"
    best, record = (
        load_file(folder / "kept" / "best.safetensors"),
        json.loads((folder / "kept" / "best.json").read_text()),
    )
    assert_same(load_file(folder / "trained.safetensors"), best, 0.0)
    shutil.copytree(root / "whole", tmp_path / "again")
    (tmp_path / "again" / "imitation" / "trained.safetensors").unlink()
    again = train(tmp_path / "again", overrides, "trainer.accumulate_grad_batches=2", "keep=last")
    assert_same(load_file(tmp_path / "again" / "imitation" / "trained.safetensors"), again, 0.0)
    assert_same(again, whole, 0.0)
    assert record["step"] in (0, STEPS)
    process = start(tmp_path / "other", overrides, "keep=newest")
    assert "keep='newest': use best or last" in process.communicate(timeout=100)[0] and process.returncode == 1


def opened(rank, run, results):
    """The trained tensors of a model whose LLM two ranks hold."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{run}.joined", rank=rank, world_size=2)
    initialize(2)
    model = MTBISALM.from_run(RunDirectory(run), tensor_model_parallel_size=2)
    assert model.vocabulary_shard.group is not None
    results[rank] = model.trained_state()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name, launch, options",
    [
        ("tp2", partial(train_on_ranks, ranks=2), [STRATEGY, "trainer.accumulate_grad_batches=2"]),
        ("sharded", partial(train_on_ranks, ranks=2), ["model.shard_optimizer=true", "trainer.val_check_interval=10"]),
        pytest.param(  # test_normalization.py has data-parallel ranks
            "tp2dp2",
            train,
            ["trainer.devices=4", "trainer.tensor_model_parallel_size=2", "trainer.val_check_interval=10"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_layouts_train_alike(root, overrides, whole, name, launch, options):
    got = launch(root / name, overrides, *options)
    assert_same(got, whole, 1e-4)
    if name == "tp2":
        kept = load_file(root / name / "imitation" / "trained.safetensors")
        for state in on_ranks(2, opened, root / name):
            assert_same(state, kept, 0.0)
    assert [s for s, _ in curve(root / name)]
    for tag in ("val_kl", "val_loss"):
        alone = [
            (step, value) for step, value in curve(root / "whole", tag) if step > 0
        ]  # one process looks at step 0 too
        for (a, x), (b, y) in zip(curve(root / name, tag), alone, strict=True):
            assert a == b and x == pytest.approx(y, rel=1e-4)


def wait_for_checkpoint(process, output):
    """Until a checkpoint is there that was not there before, or the process has ended."""
    folder = output / "imitation" / "checkpoints"
    before = {f.name for f in folder.glob("*last.ckpt")}
    while process.poll() is None and {f.name for f in folder.glob("*last.ckpt")} <= before:
        time.sleep(0.02)


LORA = (
    "+model.lora={task_type: CAUSAL_LM, r: 4, lora_alpha: 8, "
    "target_modules: [q_proj, v_proj, o_proj, up_proj, down_proj]}"
)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_another_layout_resumes(root, overrides, whole, lora):
    """SIGTERM at TP 2 x DP 2; the rest on one process."""
    output, more = root / f"moved_{lora}", [*overrides, *([LORA] if lora else [])]
    if lora:
        whole = train(root / "whole_lora", more, "trainer.accumulate_grad_batches=2")
        # The order in which weights are drawn differs between layouts; their beginning must not.
        shutil.copytree(root / "whole_lora" / "untrained", root / "begin" / "untrained")
        shutil.copy(root / "whole_lora" / "ctc_tokens.json", root / "begin")
        more.append(f"init_from={root / 'begin'}")
        assert any("lora_B" in name and value.abs().max() > 0 for name, value in whole.items())
    layout = ["trainer.devices=4", "trainer.tensor_model_parallel_size=2", "model.shard_optimizer=true"]
    process = start(output, more, *layout)
    wait_for_checkpoint(process, output)
    process.terminate()
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out[-4000:]
    assert not (output / "imitation" / "trained.safetensors").exists()
    assert_same(train(output, more, "trainer.accumulate_grad_batches=2"), whole, 1e-4)


TERMINATED = """
import os, signal, sys
from nemo_mtbi.examples.train import main
from nemo_mtbi.models import MTBISALM

start, step = MTBISALM.on_validation_epoch_start, MTBISALM.training_step
place, _, number = os.environ["TERMINATED_AT"].partition(" ")

def validating(self):
    start(self)
    if place == "validation" and self.global_step == int(number):
        os.kill(os.getpid(), signal.SIGTERM)

def training(self, batch, batch_idx):
    if place == "micro-batch" and batch_idx == int(number):
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, batch_idx)

MTBISALM.on_validation_epoch_start, MTBISALM.training_step = validating, training
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("place", "step"), [("validation 0", 0), ("validation 10", 10), ("micro-batch 6", 4)])
def test_sigterm_loses_no_step(root, overrides, whole, place, step):
    output = root / place.replace(" ", "_")
    more = ["trainer.accumulate_grad_batches=2", "exp_manager.checkpoint_callback_params.every_n_train_steps=1000"]
    arguments = command(output, overrides, *more)[3:]
    run = subprocess.run(
        [sys.executable, "-c", TERMINATED, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERMINATED_AT": place},
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    kept = [f.name for f in (output / "imitation" / "checkpoints").glob("*last.ckpt")]
    assert [f"step={step}" in name for name in kept] == [True] * bool(step)
    assert_same(train(output, overrides, *more), whole, 0.0)


@pytest.mark.slow
def test_a_run_whose_time_is_over_is_continued(root, overrides, whole):
    """``max_time_per_run``: the job ends with 0, so that the next one of a chain begins."""
    output, more = root / "timed", [*overrides, "trainer.accumulate_grad_batches=2"]
    process = start(output, more, "+exp_manager.max_time_per_run=00:00:00:01")
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and "the same command continues it" in out
    assert not (output / "imitation" / "trained.safetensors").exists()
    assert_same(train(output, more), whole, 0.0)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(root, overrides):
    output = root / "dead_rank"
    process = start(output, overrides, "trainer.devices=2", "trainer.tensor_model_parallel_size=2")
    wait_for_checkpoint(process, output)
    ranks = [c for c in psutil.Process(process.pid).children() if "nemo_mtbi.examples.train" in " ".join(c.cmdline())]
    assert len(ranks) == 1
    ranks[0].kill()
    out = process.communicate(timeout=120)[0]
    assert process.returncode != 0, out[-2000:]


def interrupt(output, overrides, kills, rng, signals):
    """Run, killed at random moments after the first step, until it ends by itself."""
    return killed_until_done(
        lambda: start(output, overrides, "trainer.accumulate_grad_batches=2"),
        lambda process: wait_for_checkpoint(process, output),
        lambda process: (output / "imitation" / "trained.safetensors").is_file(),
        kills,
        rng,
        0.4,
        signals,
    )


def test_killed_and_resumed_is_uninterrupted(root, overrides, whole):
    done = interrupt(root / "killed", overrides, 2, random.Random(0), [signal.SIGTERM, signal.SIGKILL])
    assert done
    assert_same(load_file(root / "killed" / "imitation" / "last.safetensors"), whole, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_on_shar(root, overrides, workers):
    """What is resumed draws the same batches, in its loader's workers too."""
    more = [o for o in overrides if not o.startswith("data.train_ds.input_cfg")]
    more += [f"data.train_ds.input_cfg=[{{type: mtbi, shar_path: {root}/shar/train}}]"]
    more += [f"data.train_ds.num_workers={workers}", "+data.train_ds.shuffle_buffer_size=10"]
    expected = train(root / f"shar{workers}", more, "trainer.accumulate_grad_batches=2")
    done = interrupt(root / f"killed_shar{workers}", more, 3, random.Random(2), [signal.SIGTERM, signal.SIGKILL])
    assert done == 3
    assert_same(load_file(root / f"killed_shar{workers}" / "imitation" / "last.safetensors"), expected, 0.0)


@pytest.mark.slow
def test_fifty_kills(root, overrides):
    more = [*overrides, "trainer.max_steps=300", "trainer.val_check_interval=150"]
    expected = train(root / "long", more, "trainer.accumulate_grad_batches=2")
    done = interrupt(root / "killed50", more, 50, random.Random(1), [signal.SIGTERM, signal.SIGKILL])
    assert done == 50
    assert_same(load_file(root / "killed50" / "imitation" / "last.safetensors"), expected, 0.0)
