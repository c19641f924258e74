"""The real launchers in processes of their own, from audio files to an answer, on tiny models; and their errors."""

import json
import re
import signal
import time

import numpy as np
import pytest
import soundfile
import torch

from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.evaluation.run_report import scalars
from nemo_mtbi.examples._launcher import CONF
from nemo_mtbi.models import MTBISALM
from tests.launching import Started, launch

pytestmark = pytest.mark.functional
WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("story")


@pytest.fixture(scope="module")
def corpus(root):
    """Noise bursts as speech: 14 utterances of 7 speakers."""
    rng = np.random.default_rng(0)
    lines = ["path\ttranscript\tspeaker"]
    for i in range(14):
        text = " ".join(rng.choice(WORDS, 4))
        soundfile.write(root / f"{i}.wav", 0.1 * rng.standard_normal(16000 + 800 * i), 16000)
        lines.append(f"{i}.wav\t{text}\tspeaker{i % 7}")
    (root / "t.tsv").write_text("\n".join(lines) + "\n")
    return root / "t.tsv"


@pytest.fixture(scope="module")
def model(tiny_llm, tiny_whisper):
    return [
        "speech_llm@model=offline",
        f"model.pretrained_llm={tiny_llm}",
        f"model.pretrained_asr={tiny_whisper}",
        "model.llm_dtype=float32",
        "model.perception.modality_adapter.d_model=32",
        "+model.perception.modality_adapter.heads=4",
    ]


@pytest.fixture(scope="module")
def prepared(root, corpus):
    launch(
        "prepare_data",
        f"output_dir={root}/data",
        f"sources=[{{kind: tsv, path: {corpus}}}]",
        "aligner=none",
        "split.shares={train: 0.6, held_out: 0.4}",
    )
    return root / "data"


@pytest.fixture(scope="module")
def cached(prepared, model):
    manifests = sorted(str(p) for p in prepared.glob("cuts.*.jsonl"))
    out = launch("cache_features", f"manifests=[{','.join(manifests)}]", *model)
    assert "0 in the cache, 0 left out" in out
    out = launch("cache_features", f"manifests=[{','.join(manifests)}]", *model)
    assert "0 encoded" in out
    return prepared


@pytest.fixture(scope="module")
def targets(root, cached, tiny_llm):
    launch(
        "generate_targets",
        f"output_dir={root}/targets",
        f"llm={tiny_llm}",
        "dtype=float32",
        f"cuts={{train: {cached}/cuts.train.jsonl, held_out: {cached}/cuts.held_out.jsonl}}",
        "task_names=[repeat,about]",
        "top_k=4",
        "filters=[empty]",
    )
    return root / "targets"


def train_overrides(root, targets, name, *more):
    return [
        f"output_dir={root}/{name}",
        f"data.train_ds.input_cfg.0.cuts_path={targets}/train.jsonl",
        f"data.validation_ds.datasets.held_out.input_cfg.0.cuts_path={targets}/held_out.jsonl",
        "data.cached_features=true",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "alignment_stage.trainer.max_steps=2",
        "data.train_ds.batch_size=4",
        "model.imitation.teacher=cached",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
        "trainer.log_every_n_steps=1",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(root, targets, model):
    launch("train", *model, *train_overrides(root, targets, "run"))
    return root / "run"


def test_training_writes_what_the_docs_say(trained):
    for name in ("untrained", "alignment", "imitation"):
        assert (trained / name / "trained.safetensors").stat().st_size < 2**20
    seen = json.loads((trained / "seen.json").read_text())
    counts = [p["examples"] for t in seen["tasks"].values() for p in t.values()]
    assert sum(counts) > 0 and set(seen["tasks"]) <= {"repeat", "about"}
    tags = scalars(trained / "imitation")
    assert {"loss", "val_agreement", "tokens_per_second", "padding_fraction", "gradient_norm"} <= set(tags)
    for task in seen["tasks"]:
        assert f"loss_by_task/{task}" in tags and f"val_agreement_by_task/{task}" in tags
    assert tags["val_agreement"][0][0] == 0  # validated before the first step
    for stage in ("alignment", "imitation"):
        best = json.loads((trained / stage / "kept" / "best.json").read_text())
        values = [value for _, value in scalars(trained / stage)[best["monitor"]]]
        assert best["value"] == pytest.approx((max if best["mode"] == "max" else min)(values))
        used, kept = (trained / stage / f"{name}.safetensors" for name in ("trained", "kept/best"))
        assert used.read_bytes() == kept.read_bytes()
        assert (trained / stage / "last.safetensors").is_file() and (
            trained / stage / "optimizer.safetensors"
        ).is_file()
    samples = [json.loads(line) for line in (trained / "imitation" / "kept" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(s["teacher"] and s["task"] in seen["tasks"] for s in samples)


def test_an_interrupted_stage_continues_from_its_checkpoint(root, targets, model):
    overrides = train_overrides(root, targets, "resumed", "alignment_stage.enabled=false")
    launch("train", *model, *overrides, "trainer.max_steps=2")
    (root / "resumed" / "imitation" / "trained.safetensors").unlink()  # as if it had been stopped at step 2 of 4
    checkpoints = root / "resumed" / "imitation" / "checkpoints"
    assert any("step=2" in f.name and f.stat().st_size < 2**21 for f in checkpoints.glob("*.ckpt"))
    with pytest.raises(CheckpointError, match=r"No stage of .* is finished \(imitation was begun\)"):
        MTBISALM.restore_from(root / "resumed")  # not what it started from, without a word
    told = launch("train", *model, *overrides, "model.optimizer.weight_decay=0.02")
    assert any("step=4" in f.name for f in checkpoints.glob("*.ckpt"))
    seen = json.loads((root / "resumed" / "seen.json").read_text())
    assert seen["examples"] == 16  # 4 steps of 4, the first two from the checkpoint's record
    # The configuration decides, not what the checkpoint was trained with.
    assert "lr_scheduler.max_steps 2 -> 4" in told and "optimizer.weight_decay 0.01 -> 0.02" in told
    last = torch.load(next(checkpoints.glob("*last.ckpt")), weights_only=True)
    assert last["lr_schedulers"][0]["max_steps"] == 4
    assert last["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.02


def test_what_was_interrupted_in_its_last_validation_is_validated(root, targets, model):
    overrides = train_overrides(root, targets, "unvalidated", "alignment_stage.enabled=false")
    launch("train", *model, *overrides)
    stage, record = root / "unvalidated" / "imitation", root / "unvalidated" / "imitation" / "kept" / "validated.json"
    assert json.loads(record.read_text()) == {"step": 4}
    last = (stage / "last.safetensors").read_bytes()
    for file in ("trained.safetensors", "last.safetensors", "kept/best.safetensors", "kept/best.json"):
        (stage / file).unlink()
    record.write_text('{"step": 0}')  # as a kill after the last step leaves it
    launch("train", *model, *overrides)
    assert json.loads(record.read_text()) == json.loads(record.read_text()) == {"step": 4}
    assert json.loads((stage / "kept" / "best.json").read_text())["step"] == 4
    assert (stage / "last.safetensors").read_bytes() == (stage / "trained.safetensors").read_bytes() == last
    told = launch("train", *model, *train_overrides(root, targets, "unvalidated"), ok=False)
    assert "holds a finished run that had no alignment stage" in told
    assert not (root / "unvalidated" / "alignment").exists()


def test_ctrl_c_keeps_what_is_trained(root, targets, model):
    own = ["alignment_stage.enabled=false", "trainer.max_steps=100000", "model.lr_scheduler=null"]
    overrides = train_overrides(root, targets, "stopped", *own)
    started = Started("train", [*model, *overrides])
    begun = root / "stopped" / "imitation" / "kept" / "best.json"  # of the validation before the first step
    while started.poll() is None and not begun.is_file():
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    told, _ = started.communicate(120)
    assert started.returncode == 130 and "Traceback" not in told, told[-3000:]
    step = int(re.search(r"Stopped after step (\d+); the same command continues", told)[1])
    launch("train", *model, *overrides[:-2], f"trainer.max_steps={step + 1}", "model.lr_scheduler=null")
    assert json.loads((root / "stopped" / "seen.json").read_text())["examples"] == 4 * (step + 1)


@pytest.fixture(scope="module")
def results(trained, targets):
    launch("evaluate", f"run={trained}", f"cuts={{held_out: {targets}/held_out.jsonl}}", "cached_features=true")
    return json.loads((trained / "evaluation" / "results.json").read_text())["results"]["held_out"]


@pytest.fixture(scope="module")
def exported(root, trained, results):
    """m.nemo, hf and small, with a card of the results; weights in several files."""
    targets = [f"nemo={root}/m.nemo", f"hf={root}/hf", f"trainable_only={root}/small"]
    launch("export", f"run={trained}", *targets, "max_shard_size=50KB")
    assert len(list((root / "hf").glob("*.safetensors"))) > 2
    return root


def test_evaluation_export_and_an_answer(root, trained, targets, results, exported):
    assert set(results) == {"text_topline", "cascade", "untrained", "alignment", "imitation"}
    assert results["text_topline"]["token_agreement"] == 1.0
    assert abs(results["text_topline"]["kl_per_token"]) < 1e-5
    assert (
        results["text_topline"]["repeat_wer"] < 0.15
    )  # padded and refilled batches round differently: near ties may flip
    assert (trained / "evaluation" / "results.png").stat().st_size > 5000
    assert json.loads((trained / "export.json").read_text())["round_trip_max_abs_diff"] < 1e-5
    assert sum(f.stat().st_size for f in (root / "small").rglob("*")) < 2**20
    card = (root / "hf" / "README.md").read_text()
    assert "| repeat |" in card and "text_topline" in card and str(targets) in card
    launch("report", f"run={trained}", f"output={root}/report.html")
    page = (root / "report.html").read_text()
    assert page.count("data:image/png") >= 6 and "text_topline" in page and "http" not in page.split("<pre>")[0]
    for source in ("m.nemo", "hf", "small"):
        launch("generate", f"model={root}/{source}", f"audio={root}/3.wav", "prompt=What is this?", "max_new_tokens=4")
    (root / "bad.wav").write_text("no audio")
    out = launch(
        "generate",
        f"model={root}/m.nemo",
        f"audio=[{root}/3.wav,{root}/bad.wav]",
        "prompt=What?",
        "max_new_tokens=3",
        f"output={root}/answers.jsonl",
    )
    assert "left out" in out and len((root / "answers.jsonl").read_text().splitlines()) == 1


def test_questions_arrive_letter_by_letter_and_nothing_else_is_printed(root, trained, exported, tmp_path):
    recording = root / "recording (1), a=b.wav"
    recording.write_bytes((root / "3.wav").read_bytes())
    questions = ['7 "things": {x}, it\'s ${HOME} = \\ ä 🙂\n[end', "Why?"]
    asked = [part for q in questions for part in ("--prompt", q)]
    options = ("--json", "--max-new-tokens", "3")
    out = launch("generate", root / "m.nemo", recording, root / "2.wav", *asked, *options, cwd=tmp_path)
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["prompt"] for r in records] == [q for q in questions for _ in range(2)]
    assert {r["audio"] for r in records} == {str(recording), str(root / "2.wav")}
    launch("generate", f"model={root}/m.nemo", f"audio={recording}", "prompt=In short, what?", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    assert "NeMo" in (trained / "logs" / "train.log").read_text()


@pytest.mark.slow
def test_benchmark_resumes_and_is_reproducible(root, trained, prepared):
    slots = [{"size": "small"}, {"size": "large", "drink": "tea"}, {"drink": "coffee"}]
    (root / "labels.tsv").write_text(
        "path\tslots\n" + "".join(f"{i}.wav\t{json.dumps(s)}\n" for i, s in enumerate(slots))
    )
    overrides = [
        f"output_dir={root}/benchmark",
        f"cuts={{held_out: {prepared}/cuts.held_out.jsonl}}",
        "cached_features=true",
        f"systems={{ours: {trained}, warm_start: {trained}@alignment}}",
        "trained_tasks=[repeat, sentiment]",
        "unseen_tasks=[reply, translation]",
        "max_new_tokens=6",
        "resamples=100",
        "latency_utterances=1",
        f"labelled={{orders: {{kind: slots, path: {root}/labels.tsv}}}}",
    ]
    launch("benchmark", *overrides)
    folder = root / "benchmark"
    results = json.loads((folder / "benchmark.json").read_text())["results"]["held_out"]
    labels = json.loads((folder / "benchmark.json").read_text())["results"]["orders"]["labels"]
    assert set(labels) == {"cascade", "ours", "warm_start"} and labels["ours"]["answers"] == 4
    assert set(labels["ours"]["by_task"]) == {"size", "drink"} and "accuracy_likelihood" in labels["ours"]["scores"]
    assert set(results) == {"seen_prompts", "unseen_prompts", "unseen_tasks"}
    for systems in results.values():
        assert set(systems) == {"text_topline", "cascade", "ours", "warm_start"}
        assert systems["text_topline"]["scores"]["token_agreement"]["value"] == 1.0
        assert 0 <= systems["ours"]["scores"]["rouge_l"]["value"] <= 1.0 and "against" in systems["ours"]
        assert systems["ours"]["units"] < 10 and systems["ours"]["scores"]["rouge_l"]["high"] is None
    assert "accuracy_likelihood" in results["seen_prompts"]["ours"]["scores"]
    predictions = sorted((folder / "predictions").rglob("*.jsonl"))
    before = {f: f.read_text() for f in predictions}
    assert len(predictions) == 4 * 3 + 3 and all(before.values())
    seen, unseen = (
        {
            json.loads(line)["prompt_id"]
            for line in before[folder / "predictions" / "ours" / f"held_out.{c}.jsonl"].splitlines()
        }
        for c in ("seen_prompts", "unseen_prompts")
    )
    assert seen and unseen and not seen & unseen
    broken = next(f for f in predictions if f.match("ours/held_out.unseen_prompts.jsonl"))
    broken.write_text(before[broken][: len(before[broken]) // 2])  # killed while it wrote
    launch("benchmark", *overrides)
    records = [
        {r["id"]: r for r in map(json.loads, text.splitlines())} for text in (before[broken], broken.read_text())
    ]
    assert records[0].keys() == records[1].keys()
    assert {i: r["answer"] for i, r in records[0].items()} == {i: r["answer"] for i, r in records[1].items()}
    assert all(f.read_text() == before[f] for f in predictions if f != broken)


@pytest.mark.slow
def test_two_ranks_evaluate_and_answer_like_one(root, trained, targets, results, exported):
    spread = root / "spread"
    launch(
        "evaluate",
        f"run={trained}",
        f"cuts={{held_out: {targets}/held_out.jsonl}}",
        "cached_features=true",
        "tensor_model_parallel_size=2",
        f"output_dir={spread}",
        ranks=2,
    )
    for system, scores in json.loads((spread / "results.json").read_text())["results"]["held_out"].items():
        for key in ("kl_per_token", "token_agreement"):
            assert scores[key] == pytest.approx(results[system][key], rel=1e-4, abs=1e-5), (system, key)
    question = [f"audio={root}/3.wav", "prompt=What is this?", "max_new_tokens=6"]
    launch("generate", f"model={root}/hf", *question, f"output={root}/one.jsonl")
    for number, model in enumerate(("hf", "m.nemo")):
        two = root / f"two{number}.jsonl"
        launch("generate", f"model={root}/{model}", *question, "tensor_model_parallel_size=2", f"output={two}", ranks=2)
        assert (root / "one.jsonl").read_text() == two.read_text()


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        (
            "prepare_data",
            ["output_dir={root}/x", "sources=[{{kind: tsv, path: absent.tsv}}]"],
            "absent.tsv does not exist",
        ),
        ("prepare_data", ["output_dir={root}/x", "sources=[{{kind: tsv, pth: a}}]"], "pth"),
        ("generate", ["model={root}/absent.nemo", "audio={root}/3.wav", "prompt=Hi"], "no model"),
        ("generate", ["model={root}", "audio={root}/3.wav", "prompt=Hi", "device=cuda:7"], "device=cuda:7"),
        ("generate", ["model={root}", "audio={root}/3.wav", "prompt=Hi", "device=toaster"], "use auto, cpu"),
        ("generate", ["model={root}", "audio={root}/absent.wav", "prompt=Hi"], "no audio file"),
        ("export", ["run={root}/absent", "nemo={root}/x.nemo"], "no trained model"),
        ("export", ["run={root}/absent"], "Say what to write"),
        (
            "benchmark",
            ["output_dir={root}/b", "cuts={{a: {root}/absent.jsonl}}", "systems={{x: y}}"],
            "There is no manifest",
        ),
        ("report", ["run={root}/absent"], "is not a training run"),
        (
            "generate",
            ["model={root}", "audio={root}/3.wav", "prompt=Hi", "tensor_model_parallel_size=2"],
            "needs 2 processes, 1 started",
        ),
    ],
)
def test_user_errors_are_one_message_and_exit_code_1(root, corpus, name, overrides, message):
    out = launch(name, *(o.format(root=root) for o in overrides), ok=False)
    assert message in out and "Traceback" not in out


def test_training_errors_come_before_any_weight_is_loaded(root, targets, model):
    overrides = train_overrides(root, targets, "bad")
    for change, message in (
        ("data.train_ds.input_cfg.0.cuts_path=/nowhere.jsonl", "no manifest /nowhere.jsonl"),
        ("model.imitation.divergence=l2", "divergence"),
        ("+model.imitation.w_kll=1", "w_kll"),
    ):
        out = launch("train", *model, *overrides, change, "model.pretrained_llm=/not/there", ok=False)
        assert message in out and "Traceback" not in out


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_yaml_opens_with_its_launch_command(file):
    first = file.read_text().splitlines()[0]
    assert first.startswith("# python -m nemo_mtbi.examples.") or first.startswith("# Not launched by itself")
