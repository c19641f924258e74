"""Target generation: task library, filters, resume after kills, and bad input. The LLM is tiny, the code is all of it."""

import json
import random
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from lhotse import CutSet, MonoCut, SupervisionSegment
from lhotse.testing.dummies import dummy_recording

from nemo_mtbi import models as models
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.draw import one_line
from nemo_mtbi.targets.filters import (
    Candidate,
    NearDuplicates,
    choose_filters,
    empty,
    refusal,
    repetition,
    truncated,
)
from nemo_mtbi.targets.generate import TargetGenerator
from nemo_mtbi.targets.record import Target
from nemo_mtbi.targets.workers import work, worker_context
from nemo_mtbi.tasks.forms import form_error
from nemo_mtbi.tasks.library import FORMS, load_library, load_task, render_template, select_tasks

pytestmark = pytest.mark.unit


def test_the_shipped_library_is_complete():
    library = load_library()
    assert len([t for t in library.values() if t.group == "train"]) >= 12
    assert len([t for t in library.values() if t.group == "held_out"]) >= 5
    ids = [p.id for t in library.values() for p in t.prompts]
    texts = [p.text for t in library.values() for p in t.prompts]
    assert len(ids) == len(set(ids)) and len(texts) == len(set(texts))
    for task in library.values():
        assert len(task.select("seen")) >= 7 and len(task.select("held_out")) >= 3, task.name
        assert task.form["kind"] in FORMS
    assert any(p.language == "de" for p in library["repeat"].prompts)


@pytest.mark.parametrize("template", ["{{ missing }}", "{{ ''.__class__.__mro__ }}", "{% if %}"])
def test_templates_are_sandboxed_and_strict(template):
    with pytest.raises(ConfigError, match="Prompt template"):
        render_template(template, {"known": "x"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: other\ngroup: train\nprompts: {seen: [{id: a, text: b}]}", "name must be"),
        ("name: t\ngroup: train\nprompts: {}", "there must be prompts"),
        ("name: t\ngroup: train\nprompts: {seen: [{id: a}]}", "KeyError"),
        ("name: t\ngroup: train\ncolour: red\nprompts: {seen: [{id: a, text: b}]}", "colour"),
        ("name: [", "Error"),
    ],
)
def test_bad_task_files_name_the_file(tmp_path, text, message):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_task(file)
    assert str(file) in str(error.value)


def test_unknown_tasks_are_refused():
    with pytest.raises(ConfigError, match=r"Unknown task sing.*repeat"):
        select_tasks(load_library(), ["sing"])


def candidate(response, transcript="the cat sat on the mat", finished=True):
    return Candidate(load_library()["about"], transcript, response, [1, 2, 3], finished)


def test_filters():
    assert empty(candidate("  ")) and not empty(candidate("a"))
    assert refusal(candidate("I'm sorry, but as an AI I cannot.")) and refusal(candidate("Please provide the text."))
    assert not refusal(candidate("It is about a cat.")) and not refusal(candidate("I'm sorry.", "i'm sorry i am late"))
    assert truncated(candidate("It is", finished=False)) and not truncated(candidate("It is."))
    loop = "a b c d a b c d a b c d"
    assert (
        repetition(candidate(loop)) and not repetition(candidate(loop, loop)) and not repetition(candidate("a b c d"))
    )
    with pytest.raises(ConfigError, match="Unknown filter polite"):
        choose_filters(["empty", "polite"])


@pytest.mark.parametrize(
    "task, good, bad",
    [
        ("sentiment", ["Positive.", "It is negative"], ["happy", "positive or negative", ""]),
        ("entailment", ["Yes.", "No, it does not."], ["maybe", "yes and no"]),
        ("keywords", ["cat, mat, house", "1. cat\n2. mat\n3. hat"], ["a cat on a mat", "cat, mat"]),
        ("title", ["The Cat on the Mat"], ["a b c d e f g h i"]),
        ("question_generation", ["Where is the cat?", '"Who is it?"'], ["The cat.", "? no"]),
        ("translation", ["Die Katze ist auf der Matte."], ["The cat is on the mat."]),
        ("repeat", ["anything at all"], []),
    ],
)
def test_answer_forms(task, good, bad):
    chosen = load_library()[task]
    values = {"language": "German"}
    assert [form_error(t, chosen, values) for t in good] == [None] * len(good)
    assert all(form_error(t, chosen, values) for t in bad)


def test_the_form_filter_is_off_by_default_and_works_by_name():
    assert "form" not in TargetsConfig().filters
    ((_, check),) = choose_filters(["form"])
    assert check(Candidate(load_library()["sentiment"], "x", "who knows", [1], True))


def write_cuts(path, count, text=lambda i: f"sentence number {i} is here"):
    cuts = [
        MonoCut(
            f"utt{i}", 0, 1.0, 0, recording=dummy_recording(i),
            supervisions=[SupervisionSegment(f"utt{i}", f"dummy-recording-{i:04d}", 0, 1.0, text=text(i), speaker="s")],
        )
        for i in range(count)
    ]  # fmt: skip
    CutSet(cuts).to_file(path)
    return str(path)


def config(tmp_path, tiny_llm, cuts, **changes):
    values = {
        "cuts": {"train": cuts}, "output_dir": str(tmp_path / "targets"), "llm": tiny_llm, "dtype": "float32",
        "batch_size": 8, "prompt_format": "chatml", "task_names": ["repeat", "about"], "filters": ["empty"], "top_k": 4,
    }  # fmt: skip
    return TargetsConfig(**{**values, **changes})


def everything(folder):
    """Bytes of all final files: manifests, rejected answers, and the arrays that the manifests point into."""
    files = [*folder.glob("*.jsonl"), *folder.glob("rejected/*.jsonl"), *folder.glob("teacher/*.bin")]
    return {f.name: f.read_bytes().replace(str(folder).encode(), b"OUT") for f in sorted(files)}


def answered(folder):
    """Keys of all generated answers, in order of their files."""
    files = sorted(folder.glob("shards/*/*.answers.jsonl"))
    return [r["key"] for f in files for line in f.read_text().splitlines() for r in json.loads(line)["answers"]]


def test_targets_are_lhotse_cuts_with_teacher_arrays(tmp_path, tiny_llm):
    generator = TargetGenerator(config(tmp_path, tiny_llm, write_cuts(tmp_path / "cuts.jsonl", 5), shard_cuts=2))
    path = generator.run()["train"]
    assert [c.id for c in CutSet.from_file(path)] == [f"utt{i}" for i in range(5)]
    for cut in CutSet.from_file(path):
        targets = [Target(**t) for t in cut.custom["targets"]]
        assert {t.task for t in targets} == {"repeat", "about"}
        ids, log_probs = cut.load_custom("teacher_ids"), cut.load_custom("teacher_log_probs")
        assert ids.shape == log_probs.shape == (sum(len(t.response_ids) for t in targets), 4)
        for target in targets:
            rows = slice(target.teacher_begin, target.teacher_begin + len(target.response_ids))
            assert ids[rows, 0].tolist() == target.response_ids  # greedy: the answer is the most likely token
    manifest = json.loads((tmp_path / "targets" / "manifest.json").read_text())
    assert manifest["targets"] == 10 and manifest["teacher"]["fingerprint"] and manifest["versions"]["transformers"]
    assert sum(n for t in manifest["targets_by_task_and_prompt"].values() for n in t.values()) == 10
    assert manifest["tokenizer"]["digest"] and manifest["by_manifest"]["train"]["kept"] == 10


def test_a_half_written_answer_file_is_continued_to_the_same_bytes(tmp_path, tiny_llm, monkeypatch):
    monkeypatch.setattr("nemo_mtbi.targets.shards.CHUNK", 5)
    cuts = write_cuts(tmp_path / "cuts.jsonl", 12)
    whole_config = config(tmp_path, tiny_llm, cuts, shard_cuts=5)
    TargetGenerator(whole_config).run()
    whole = everything(tmp_path / "targets")
    complete = (tmp_path / "targets" / "shards" / "train" / "000001.answers.jsonl").read_bytes()
    rng = random.Random(0)
    for trial in range(4):
        own = tmp_path / f"trial{trial}"
        shards = own / "targets" / "shards" / "train"
        shards.mkdir(parents=True)
        (shards / "000001.answers.jsonl").write_bytes(complete[: rng.randrange(len(complete))])
        arrays = tmp_path / "targets" / "shards" / "train" / "000001.answers.bin"
        (shards / "000001.answers.bin").write_bytes(arrays.read_bytes())
        TargetGenerator(config(own, tiny_llm, cuts, shard_cuts=5)).run()
        assert everything(own / "targets") == whole
        keys = answered(own / "targets")
        assert len(keys) == len(set(keys)) == 24


def test_workers_killed_at_any_time_lose_and_double_nothing(tmp_path, tiny_llm, kills=6):
    """Three workers; one of them is killed at a random moment and replaced, again and again."""
    cuts = write_cuts(tmp_path / "cuts.jsonl", 40)
    options = {"shard_cuts": 3, "task_names": ["repeat", "about", "summary", "title"]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each worker has: sums over threads round differently
    TargetGenerator(config(tmp_path, tiny_llm, cuts, **options)).run()
    torch.set_num_threads(threads)
    own = config(tmp_path / "killed", tiny_llm, cuts, workers=3, **options)
    context, rng = worker_context(), random.Random(0)

    def start(rank):
        process = context.Process(target=work, args=(own, rank))
        process.start()
        return process

    processes = [start(rank) for rank in range(3)]
    killed = 0
    for _ in range(kills):
        time.sleep(rng.uniform(0.2, 1.5))
        victim = rng.randrange(3)
        killed += processes[victim].is_alive()
        processes[victim].kill()
        processes[victim].join()
        processes[victim] = start(victim)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert killed
    TargetGenerator(own).merge()
    assert everything(tmp_path / "killed" / "targets") == everything(tmp_path / "targets")
    keys = answered(tmp_path / "killed" / "targets")
    assert len(keys) == len(set(keys)) == 160


@pytest.mark.slow
def test_thirty_kills_of_three_workers(tmp_path, tiny_llm):
    test_workers_killed_at_any_time_lose_and_double_nothing(tmp_path, tiny_llm, kills=30)


def test_changes_regenerate_only_what_they_affect(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 6)
    folder = tmp_path / "targets"
    TargetGenerator(config(tmp_path, tiny_llm, cuts, shard_cuts=2)).run()
    before = set(answered(folder))
    write_cuts(tmp_path / "cuts.jsonl", 6, lambda i: f"sentence number {i} is {'there' if i == 3 else 'here'}")
    TargetGenerator(config(tmp_path, tiny_llm, cuts, shard_cuts=2)).run()
    assert len(set(answered(folder)) - before) == 2
    again = TargetGenerator(config(tmp_path, tiny_llm, cuts, shard_cuts=2))
    again.run()
    assert again.engine.engine is None  # nothing missing: the LLM was not even loaded
    # Other shards, and a cut more at the end: answers are found again where they are.
    write_cuts(tmp_path / "cuts.jsonl", 7, lambda i: f"sentence number {i} is {'there' if i == 3 else 'here'}")
    known = set(answered(folder))
    moved = TargetGenerator(config(tmp_path, tiny_llm, cuts, shard_cuts=3))
    written = moved.run()["train"]
    assert len(set(answered(folder)) - known) == 2
    for cut in CutSet.from_file(written):
        ids = cut.load_custom("teacher_ids")[:, 0].tolist()
        assert ids == [t for target in cut.custom["targets"] for t in target["response_ids"]]


def test_rejected_answers_are_kept_with_the_reason(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 6)
    with pytest.raises(DataError, match=r"No answer is left for train[\s\S]*rejected\.jsonl"):
        TargetGenerator(config(tmp_path, tiny_llm, cuts, filters=["truncated"])).run()
    written = TargetGenerator(config(tmp_path, tiny_llm, cuts, filters=["empty", "repetition"])).run()["train"]
    lines = (tmp_path / "targets" / "rejected" / "train.jsonl").read_text().splitlines()
    side = [json.loads(line) for line in lines]
    kept = sum(len(json.loads(line)["custom"]["targets"]) for line in written.read_text().splitlines())
    assert kept + len(side) == 12 and all(r["filter"] and r["reason"] and r["manifest"] == "train" for r in side)
    budget = config(tmp_path, tiny_llm, cuts, filters=["empty", "too_long"], max_total_tokens=60)
    with pytest.raises(DataError, match="'too_long': 12"):
        TargetGenerator(budget).run()


def test_near_duplicates_within_a_wording(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 6, lambda i: "the same words")
    values = {
        "task_names": ["about"],
        "filters": ["empty", "near_duplicate"],
        "prompts_per_task": 0,
        "max_duplicates": 2,
    }
    written = TargetGenerator(config(tmp_path, tiny_llm, cuts, shard_cuts=2, **values)).run()["train"]
    kept = [len(json.loads(line)["custom"]["targets"]) for line in written.read_text().splitlines()]
    wordings = len(load_library()["about"].select("seen"))
    assert kept == [wordings] * 2 + [0] * 4
    manifest = json.loads((tmp_path / "targets" / "manifest.json").read_text())
    assert manifest["rejected"] == {"near_duplicate": 4 * wordings} and manifest["targets"] == 2 * wordings
    check = NearDuplicates(1).check
    about, sentiment = load_library()["about"], load_library()["sentiment"]
    assert check(about, "a", "A cat, 2 dogs.") is None and check(about, "b", "A cat, 2 dogs.") is None
    duplicates = NearDuplicates(1)
    assert duplicates.check(about, "a", "A cat, 2 dogs.") is None and duplicates.check(about, "a", "dogs: a cat!")
    assert duplicates.check(sentiment, "a", "positive") is None and duplicates.check(sentiment, "a", "positive") is None


def test_language_filter():
    ((_, check),) = choose_filters(["language"])
    german = "Das ist eine sehr schöne Katze auf der Matte, und sie schläft den ganzen Tag."
    english = "This is a very nice cat on the mat, and it sleeps the whole day long."

    def of(text, languages, task="about"):
        return check(Candidate(load_library()[task], "x", text, [1], True, languages=languages))

    assert of(english, ("en",)) is None and of(german, ("en", "de")) is None and of("Guten Tag", ("en",)) is None
    assert "reads like de" in of(german, ("en",))
    assert of(german, ("en",), "translation") is None  # its form says which language


def test_prompts_longer_than_the_context_are_rejected_and_counted(tmp_path, tiny_llm):
    long = "very " * 2000
    cuts = write_cuts(tmp_path / "cuts.jsonl", 3, lambda i: long if i == 1 else "short")
    written = TargetGenerator(config(tmp_path, tiny_llm, cuts)).run()["train"]
    kept = [len(json.loads(line)["custom"]["targets"]) for line in written.read_text().splitlines()]
    assert kept == [2, 0, 2]
    assert json.loads((tmp_path / "targets" / "manifest.json").read_text())["rejected"] == {"context": 2}


def test_a_full_disk_is_said_and_the_run_continues(tmp_path, tiny_llm):
    """A limit on file sizes stands for the full disk: writing fails in the middle of a file."""
    cuts = write_cuts(tmp_path / "cuts.jsonl", 12)
    script = tmp_path / "run.py"
    script.write_text(
        "import json, resource, sys\n"
        "from nemo_mtbi import models\n"
        "from nemo_mtbi.targets.config import TargetsConfig\n"
        "from nemo_mtbi.targets.generate import TargetGenerator\n"
        "config = TargetsConfig(**json.loads(sys.argv[1]) | {'openai': TargetsConfig().openai})\n"
        "generator = TargetGenerator(config)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "generator.run()\n"
    )
    own = config(tmp_path, tiny_llm, cuts)
    settings = json.dumps({k: v for k, v in asdict(own).items() if k != "openai"})
    result = subprocess.run([sys.executable, str(script), settings], capture_output=True, text=True)
    assert result.returncode == 1 and "Make room" in result.stderr and "File too large" in result.stderr
    TargetGenerator(own).run()
    whole = config(tmp_path / "whole", tiny_llm, cuts)
    TargetGenerator(whole).run()
    assert everything(tmp_path / "targets") == everything(tmp_path / "whole" / "targets")


def draw(generator, cuts):
    values = generator.drawer.prepare(cuts, "train", lambda requests: {})
    return [job for cut in cuts for job in generator.drawer.jobs(cut, "train", values)]


def test_drawing_tasks_and_prompts(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 40)
    drawn = config(tmp_path, tiny_llm, cuts, task_names=["repeat", "about", "title"], tasks_per_cut={"train": 1})
    generator = TargetGenerator(drawn)
    listed = list(CutSet.from_file(cuts))
    jobs = draw(generator, listed)
    assert len(jobs) == 40 and {j.task for j in jobs} == {"repeat", "about", "title"}
    assert len({j.prompt_id for j in jobs}) > 15
    half = TargetGenerator(config(tmp_path / "half", tiny_llm, cuts, tasks_per_cut={"train": 0.5}))
    assert 10 < len(draw(half, listed)) < 30
    again = TargetGenerator(drawn)
    assert jobs == draw(again, listed)


def test_prepared_questions_fill_the_prompt(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 3)
    chosen = config(tmp_path, tiny_llm, cuts, task_names=["question_answering", "entailment"], prompts_per_task=2)
    written = TargetGenerator(chosen).run()["train"]
    for line in written.read_text().splitlines():
        targets = json.loads(line)["custom"]["targets"]
        assert {t["task"] for t in targets} <= {"question_answering", "entailment"} and targets
        assert all("{{" not in t["prompt"] and t["rendering"].startswith("chatml/after/") for t in targets)
    assert one_line(' "Is it raining?"\nYes.') == "Is it raining?" and one_line("") == ""


@pytest.mark.parametrize("path, message", [("absent.jsonl", "no manifest"), ("empty.jsonl", "is empty")])
def test_missing_and_empty_manifests(tmp_path, tiny_llm, path, message):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=message):
        TargetGenerator(config(tmp_path, tiny_llm, str(tmp_path / path)))


def test_cuts_without_transcript_are_counted(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 3, lambda i: "words" if i else "")
    TargetGenerator(config(tmp_path, tiny_llm, cuts)).run()
    assert json.loads((tmp_path / "targets" / "manifest.json").read_text())["rejected"] == {"no_transcript": 1}
    cuts = write_cuts(tmp_path / "cuts.jsonl", 2, lambda i: "")
    with pytest.raises(DataError, match="No answer is left.*'no_transcript': 2"):
        TargetGenerator(config(tmp_path, tiny_llm, cuts)).run()
