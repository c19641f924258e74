"""Target generation: task library, filters, resume after kills, and bad input. The LLM is tiny, the code is all of it."""

import json
import random

import pytest
from lhotse import CutSet, MonoCut, SupervisionSegment
from lhotse.testing.dummies import dummy_recording

from nemo_mtbi import models as models
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.filters import Candidate, choose_filters, empty, refusal, repetition, truncated
from nemo_mtbi.targets.generate import TargetGenerator, one_line
from nemo_mtbi.targets.record import Target
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


def content(path):
    """Manifest lines without what depends on the order of generation (places in the array file)."""
    lines = []
    for line in path.read_text().splitlines():
        cut = json.loads(line)
        lines.append((cut["id"], cut["custom"].get("targets")))
    return lines


def test_targets_are_lhotse_cuts_with_teacher_arrays(tmp_path, tiny_llm):
    generator = TargetGenerator(config(tmp_path, tiny_llm, write_cuts(tmp_path / "cuts.jsonl", 5)))
    path = generator.run()["train"]
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


def test_killed_at_any_time_the_result_is_the_same(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 12)
    whole = content(TargetGenerator(config(tmp_path, tiny_llm, cuts)).run()["train"])
    complete = (tmp_path / "targets" / "responses.jsonl").read_bytes()
    rng = random.Random(0)
    for trial in range(4):
        own = tmp_path / f"trial{trial}"
        (own / "targets").mkdir(parents=True)
        (own / "targets" / "responses.jsonl").write_bytes(complete[: rng.randrange(len(complete))])
        kept = config(own, tiny_llm, cuts)
        generator = TargetGenerator(kept)
        assert content(generator.run()["train"]) == whole
        keys = [json.loads(line)["key"] for line in (own / "targets" / "responses.jsonl").read_text().splitlines()]
        assert len(keys) == len(set(keys)) == 24


def test_changes_regenerate_only_what_they_affect(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 6)
    TargetGenerator(config(tmp_path, tiny_llm, cuts)).run()
    responses = tmp_path / "targets" / "responses.jsonl"
    before = len(responses.read_text().splitlines())
    write_cuts(tmp_path / "cuts.jsonl", 6, lambda i: f"sentence number {i} is {'there' if i == 3 else 'here'}")
    TargetGenerator(config(tmp_path, tiny_llm, cuts)).run()
    assert len(responses.read_text().splitlines()) == before + 2
    again = TargetGenerator(config(tmp_path, tiny_llm, cuts))
    again.run()
    assert again.engine is None  # nothing missing: the LLM was not even loaded


def test_rejected_answers_are_kept_with_the_reason(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 6)
    with pytest.raises(DataError, match=r"No answer is left for train[\s\S]*rejected\.jsonl"):
        TargetGenerator(config(tmp_path, tiny_llm, cuts, filters=["truncated"])).run()
    written = TargetGenerator(config(tmp_path, tiny_llm, cuts, filters=["empty", "repetition"])).run()["train"]
    side = [json.loads(line) for line in (tmp_path / "targets" / "rejected.jsonl").read_text().splitlines()]
    kept = sum(len(json.loads(line)["custom"]["targets"]) for line in written.read_text().splitlines())
    assert kept + len(side) == 12 and all(r["filter"] and r["reason"] and r["manifest"] == "train" for r in side)


def test_drawing_tasks_and_prompts(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 40)
    drawn = config(tmp_path, tiny_llm, cuts, task_names=["repeat", "about", "title"], tasks_per_cut={"train": 1})
    generator = TargetGenerator(drawn)
    listed = list(CutSet.from_file(cuts))
    jobs = [j for cut in listed for j in generator.jobs(cut, "train", generator._prepare(listed, "train"))]
    assert len(jobs) == 40 and {j.task for j in jobs} == {"repeat", "about", "title"}
    assert len({j.prompt_id for j in jobs}) > 15
    again = TargetGenerator(drawn)
    assert jobs == [j for cut in listed for j in again.jobs(cut, "train", again._prepare(listed, "train"))]


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


def test_cut_without_transcript(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 2, lambda i: "")
    with pytest.raises(DataError, match="utt0 has no transcript"):
        TargetGenerator(config(tmp_path, tiny_llm, cuts)).run()
