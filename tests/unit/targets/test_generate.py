"""Target generation: resume after kills, bad input. The LLM is tiny, the code is all of it."""

import errno
import io
import json
import random
import resource
import time
from pathlib import Path

import pytest
import torch
from lhotse import CutSet
from tqdm import tqdm
from transformers import AutoTokenizer

from nemo_mtbi import registration as registration
from nemo_mtbi.data.target import Target
from nemo_mtbi.errors import ConfigError, DataError, MTBIError, ShardError
from nemo_mtbi.targets.config import OpenAIConfig
from nemo_mtbi.targets.filters import (
    Candidate,
    NearDuplicates,
    choose_filters,
)
from nemo_mtbi.targets.generate import TargetGenerator
from nemo_mtbi.targets.workers import wait, work
from nemo_mtbi.tasks.library import load_library
from tests.launching import CONTEXT, on_ranks
from tests.unit.targets_helpers import config, write_cuts

pytestmark = pytest.mark.unit


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


def test_where_nothing_is_said_the_answer_is_fixed(tmp_path, tiny_llm):
    path = write_cuts(tmp_path / "cuts.jsonl", 3, lambda i: "" if i else "hello there")
    cuts = list(CutSet.from_file(path))
    cuts[2].custom = {"no_speech": True}
    CutSet(cuts).to_file(path)
    spoken, empty, silent = CutSet.from_file(TargetGenerator(config(tmp_path, tiny_llm, path)).run()["train"])
    assert {t["task"] for t in spoken.custom["targets"]} == {"repeat", "about"} and not empty.custom["targets"]
    targets = [Target(**t) for t in silent.custom["targets"]]
    assert len(targets) == 2 and {t.prompt_id for t in targets} <= {
        p.id for name in ("repeat", "about") for p in load_library()[name].prompts
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    for target in targets:
        assert (target.task, target.response, target.finished) == ("no_speech", "I did not hear any speech.", True)
        assert tokenizer.decode(target.response_ids) == "I did not hear any speech.<|im_end|>"
    ids, log_probs = silent.load_custom("teacher_ids"), silent.load_custom("teacher_log_probs")
    assert ids[:, 0].tolist() == [i for t in targets for i in t.response_ids]
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert (log_probs[:, 0] == 0).all() and (log_probs[:, 1:] <= -100).all()
    manifest = json.loads((tmp_path / "targets" / "manifest.json").read_text())
    assert manifest["by_manifest"]["train"]["kept"] == 4 and len(manifest["targets_by_task_and_prompt"]) == 3


@pytest.mark.slow
def test_outputs_whose_names_begin_alike_keep_their_arrays(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 2)
    names = {"train": cuts, "train.960": cuts}
    for budget in (5, 6):
        settings = config(tmp_path, tiny_llm, cuts, max_new_tokens=budget)
        settings.cuts, settings.tasks_per_cut = names, {}
        written = TargetGenerator(settings).run()
        for path in written.values():
            assert all(len(cut.load_custom("teacher_ids")) for cut in CutSet.from_file(path))
    assert len(list((tmp_path / "targets" / "teacher").iterdir())) == 2


def test_the_bar_of_several_workers_counts_cuts(tmp_path, tiny_llm, monkeypatch):
    cuts, told, shown = write_cuts(tmp_path / "cuts.jsonl", 12), [], []
    generator = TargetGenerator(config(tmp_path, tiny_llm, cuts, shard_cuts=6))
    generator.writer.advance = told.append

    class Bar(tqdm):
        def update(self, n=1):
            super().update(n)
            shown.append(self.n)

    class Worker:
        """A process, as its parent sees it: it is at a shard's fourth cut, then done with that shard, then with all."""

        exitcode = None

        def join(self, seconds):
            if answered[0] == 0:
                answered[0] = 4
            elif len(shown) == 2:
                generator.take(first)
                answered[0] = 0
            else:
                generator.take(second)
                self.exitcode = 0

    answered, (first, second) = [0.0], generator.shards["train"]

    def bar(unit, **options):
        return (Bar if unit == "cut" else tqdm)(file=io.StringIO(), unit=unit, **options)

    monkeypatch.setattr("nemo_mtbi.console.progress", bar)
    wait([Worker()], generator, answered)
    assert shown == [0, 4, 6, 10]  # and the fourth of the next one
    ends = [i for i, value in enumerate(told) if value == 0]
    for part in (told[: ends[0]], told[ends[0] + 1 : ends[1]]):
        assert part == sorted(part) and part[-1] == 6


@pytest.mark.slow
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


@pytest.mark.slow
def test_workers_killed_at_any_time_lose_and_double_nothing(tmp_path, tiny_llm, kills=6):
    """Three workers; one of them is killed at a random moment and replaced, again and again."""
    count = 40 * max(1, kills // 4)  # enough for a fast machine not to be done before
    cuts = write_cuts(tmp_path / "cuts.jsonl", count)
    options = {"shard_cuts": 3, "task_names": ["repeat", "about", "summary", "title"]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each worker has: sums over threads round differently
    TargetGenerator(config(tmp_path, tiny_llm, cuts, **options)).run()
    torch.set_num_threads(threads)
    own = config(tmp_path / "killed", tiny_llm, cuts, workers=3, **options)
    rng = random.Random(0)

    def start(rank):
        process = CONTEXT.Process(target=work, args=(own, rank))
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
    assert killed > kills // 2
    TargetGenerator(own).merge()
    assert everything(tmp_path / "killed" / "targets") == everything(tmp_path / "targets")
    keys = answered(tmp_path / "killed" / "targets")
    assert len(keys) == len(set(keys)) == 4 * count


@pytest.mark.slow
def test_fifty_kills_of_three_workers(tmp_path, tiny_llm):
    test_workers_killed_at_any_time_lose_and_double_nothing(tmp_path, tiny_llm, kills=50)


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


def with_little_room(rank, own, results):
    generator = TargetGenerator(own)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        generator.run()
    except MTBIError as error:
        results[rank] = str(error)


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_continues(tmp_path, tiny_llm):
    """A limit on file sizes stands for the full disk: writing fails in the middle of a file."""
    cuts = write_cuts(tmp_path / "cuts.jsonl", 12)
    own = config(tmp_path, tiny_llm, cuts)
    (said,) = on_ranks(1, with_little_room, own)
    assert "Make room" in said and "File too large" in said
    TargetGenerator(own).run()
    whole = config(tmp_path / "whole", tiny_llm, cuts)
    TargetGenerator(whole).run()
    assert everything(tmp_path / "targets") == everything(tmp_path / "whole" / "targets")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"tasks_per_cut": {"train": -1}}, "tasks_per_cut.train=-1"),
        ({"task_names": ["repeat", "repeat"]}, "each once"),
        ({"task_names": []}, "at least one task"),
        ({"llm": "/missing/llm"}, "There is no model /missing/llm"),
    ],
)
def test_values_that_cannot_work(tmp_path, tiny_llm, changes, message):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 1)
    with pytest.raises(ConfigError, match=message):
        TargetGenerator(config(tmp_path, tiny_llm, cuts, **changes))


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


@pytest.mark.parametrize("top_k", [0, 4])
def test_a_task_may_give_the_answer_itself(tmp_path, tiny_llm, top_k):
    """Fine-tuning on ASR: transcripts as they stand; the LLM is not even loaded."""
    texts = ["Seven boats, 2 harbours.", 'He said: "<|im_end|>"', "too long " * 200]
    cuts = write_cuts(tmp_path / "cuts.jsonl", 3, lambda i: texts[i])
    generator = TargetGenerator(config(tmp_path, tiny_llm, cuts, task_names=["transcription"], top_k=top_k))
    written = list(CutSet.from_jsonl(generator.run()["train"]))
    assert generator.engine.engine is None
    tokenizer = generator.drawer.tokenizer.tokenizer
    for cut, text in zip(written, texts[:2], strict=False):
        (target,) = cut.custom["targets"]
        assert target["response"] == text and target["prompt"] == "Transcribe the speech into text."
        ids = target["response_ids"]
        assert tokenizer.decode(ids[:-1]) == text and ids[-1] == generator.drawer.end_of_turn and 2 not in ids[:-1]
        if top_k:  # a cached teacher that is sure of each token
            kept, log_probs = cut.load_custom("teacher_ids"), cut.load_custom("teacher_log_probs")
            assert kept[:, 0].tolist() == ids and kept.shape == (len(ids), top_k)
            assert (log_probs[:, 0] == 0).all() and (log_probs[:, 1:] == -100).all()
    assert not written[2].custom["targets"]
    (rejected,) = (tmp_path / "targets" / "rejected" / "train.jsonl").read_text().splitlines()
    assert json.loads(rejected)["filter"] == "truncated" and "of 160 that the task may have" in rejected
    others = write_cuts(tmp_path / "others.jsonl", 2, lambda i: "Other words.")
    other = TargetGenerator(config(tmp_path, tiny_llm, others, task_names=["transcription"]))
    assert "Other words." in other.run()["train"].read_text()  # another answer, another key


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"engine": "openai", "top_k": 4}, "no log-probabilities by token id"),
        ({"engine": "openai", "top_k": 0, "openai": OpenAIConfig(concurrency=0)}, r"openai\.concurrency=0"),
        ({"engine": "openai", "top_k": 0, "openai": OpenAIConfig(requests_per_minute=0)}, "requests_per_minute=0"),
        ({"shar_size": 0}, "shar_size=0"),
        ({"shar_audio": "opuss"}, "shar_audio='opuss'"),
    ],
)
def test_values_that_would_fail_late_are_refused(tmp_path, tiny_llm, changes, message):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 1)
    with pytest.raises(ConfigError, match=message):
        TargetGenerator(config(tmp_path, tiny_llm, cuts, **changes))


def test_shar_without_a_readable_recording_is_no_success(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 3)  # whose audio does not exist
    with pytest.raises(DataError, match="No recording of .* can be read for Shar"):
        TargetGenerator(config(tmp_path, tiny_llm, cuts, shar_dir=str(tmp_path / "shar"))).run()
    assert not (tmp_path / "shar" / "train").exists()


def test_a_lost_disk_is_no_broken_recording(tmp_path, tiny_llm, monkeypatch):
    """Otherwise the Shar would lack it for good."""
    generator = TargetGenerator(
        config(tmp_path, tiny_llm, write_cuts(tmp_path / "cuts.jsonl", 3), shar_dir=str(tmp_path / "shar"))
    )

    def lost(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("lhotse.cut.MonoCut.load_audio", lost)
    with pytest.raises(DataError, match="Stale file handle"):
        generator.run()
    assert not (tmp_path / "targets" / "shards" / "train" / "merged.json").exists()


def test_a_broken_shard_leaves_the_others_to_be_finished(tmp_path, tiny_llm):
    path = Path(write_cuts(tmp_path / "cuts.jsonl", 8))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2], lines[2], *lines[4:]]))  # one id twice in the second shard
    generator = TargetGenerator(config(tmp_path, tiny_llm, str(path), shard_cuts=2))
    with pytest.raises(ShardError, match="utt2"):
        generator.run()
    [shards] = generator.shards.values()
    assert [generator.writer.status(shard) is not None for shard in shards] == [True, False, True, True]


def test_near_duplicates_where_nothing_is_said(tmp_path, tiny_llm):
    path = write_cuts(tmp_path / "cuts.jsonl", 2)
    cuts = list(CutSet.from_file(path))
    cuts[1].custom, cuts[1].supervisions[0].text = {"no_speech": True}, ""
    CutSet(cuts).to_file(path)
    settings = config(tmp_path, tiny_llm, path, filters=["empty", "near_duplicate"])
    spoken, silent = CutSet.from_file(TargetGenerator(settings).run()["train"])
    assert spoken.custom["targets"] and {t["task"] for t in silent.custom["targets"]} == {"no_speech"}
