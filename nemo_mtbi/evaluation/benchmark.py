"""The generalization benchmark: seen prompts, unseen prompts, unseen tasks; scores against the text LLM.

::

    <output_dir>/references/<trained|unseen>/   the text topline's answers, as targets (nemo_mtbi/targets)
    <output_dir>/predictions/<system>/<set>.<column>.jsonl
    <output_dir>/benchmark.json, .md, .html, .png
"""

import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet

from nemo_mtbi.data import jsonl
from nemo_mtbi.data.audio import mono_samples
from nemo_mtbi.data.conversation import MTBIConversation, transcript
from nemo_mtbi.data.feature_cache import features_key
from nemo_mtbi.evaluation.asr import RATE, WhisperASR
from nemo_mtbi.evaluation.labelled import label_measures, label_of
from nemo_mtbi.evaluation.metrics import Measure, measures, sums_of
from nemo_mtbi.evaluation.statistics import Bootstrap, Sums
from nemo_mtbi.evaluation.systems import (
    Questions,
    Reading,
    System,
    TextLLM,
    against_the_text_llm,
    log_likelihoods,
    readings,
)
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.targets import workers
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.tasks.library import Task

SEEN_PROMPTS, UNSEEN_PROMPTS, UNSEEN_TASKS = COLUMNS = ("seen_prompts", "unseen_prompts", "unseen_tasks")
TOPLINE, CASCADE, NORMALIZED_CASCADE = "text_topline", "cascade", "cascade_normalized"
Scored = dict[str, tuple[dict[str, Any], dict[str, Measure]]]  # id of a record -> the record and its measures


def write_references(
    folder: Path, cuts: dict[str, str], trained: list[str], unseen: list[str], settings: dict[str, Any]
) -> dict[str, dict[str, Path]]:
    """The text LLM's answers: ``[set][column]`` -> manifest with targets. Finished ones are reused.

    Args:
        folder: for the two target folders.
        cuts: manifests by set name.
        trained: tasks of the first two columns.
        unseen: tasks of the third.
        settings: further fields of :class:`TargetsConfig` (llm, prompt_format, dtype, ...).
    """
    plans = {
        "trained": (trained, {SEEN_PROMPTS: "seen", UNSEEN_PROMPTS: "held_out"}),
        "unseen": (unseen, {UNSEEN_TASKS: "all"}),
    }
    manifests: dict[str, dict[str, Path]] = {name: {} for name in cuts}
    for group, (tasks, columns) in plans.items():
        named = {f"{name}.{column}": path for name, path in cuts.items() for column in columns}
        splits = {key: columns[key.rpartition(".")[2]] for key in named}
        config = TargetsConfig(
            cuts=named, output_dir=str(folder / group), task_names=tasks, splits=splits, filters=["empty"], **settings
        )
        for key, path in workers.run(config).items():
            name, _, column = key.rpartition(".")
            manifests[name][column] = path
    return manifests


class Predictions:
    """Answers and teacher-forced sums of one system, kept as JSONL and continued after an interruption.

    Args:
        folder: of the system's files.
        key: of everything that decides its answers; records with another key are made anew.
        choices: possible answers to a conversation's prompt; none for free text.
        budget: tokens that an answer may take.
        batch_size: conversations read together.
        text_llm: that the stored responses are compared with; one for all systems saves its forward passes.
        generate: let the system answer too; without answers only what teacher forcing gives is scored.
    """

    def __init__(
        self,
        folder: Path,
        key: str, choices: Callable[[MTBIConversation], list[str]],
        budget: Callable[[MTBIConversation], int], batch_size: int,
        text_llm: TextLLM | None = None, generate: bool = True,
    ) -> None:  # fmt: skip
        self.folder, self.key, self.choices = folder, key, choices
        self.budget, self.batch_size, self.generate = budget, batch_size, generate
        self.text_llm = text_llm or TextLLM()

    @torch.no_grad()
    def predict(
        self, name: str, model: MTBISALM, system: System, questions: Questions, imitation: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Records by conversation id.

        Args:
            name: of the file.
            model: gives LLM and tokenizer.
            system: that answers.
            questions: conversations.
            imitation: score the stored responses against the text LLM on the transcript, too.
        """
        file = self.folder / f"{name}.jsonl"
        jsonl.repair(file)
        wanted = {record_id(c): c for c in questions.conversations}
        keys = {i: self._key(c) for i, c in wanted.items()}
        done = {r["id"]: r for r in jsonl.read(file) if keys.get(r["id"]) == r["key"]}
        missing = [c for i, c in wanted.items() if i not in done]
        title = f"{self.folder.name}: {name}"
        with jsonl.Appender(file) as out:
            for reading in readings(system, questions, missing, self.batch_size, title):
                for record in self._records(model, system, reading, imitation):
                    out.write(record)
                    done[record["id"]] = record
        return {i: done[i] for i in wanted if i in done}

    def _key(self, conversation: MTBIConversation) -> str:
        """Of everything that decides a record: the system, the question with its reference answer and label, and the audio."""
        target = conversation.target
        assert target is not None
        said = (transcript(conversation.cut), label_of(conversation))
        return key_of(
            self.key, target.rendering, target.prompt, target.response, *said, features_key(conversation.cut, "")
        )

    def _records(self, model: MTBISALM, system: System, reading: Reading, imitation: bool) -> Iterable[dict[str, Any]]:
        forced = None
        if imitation and system.teacher_forced:
            forced = against_the_text_llm(model, system, reading, self.text_llm)
        answers: list[str] = []
        if self.generate:
            answers = system.answers(reading, max(self.budget(c) for c in reading.conversations))
        chosen = self._choices(model, system, reading)
        for i, (conversation, example) in enumerate(zip(reading.conversations, reading.examples, strict=True)):
            target = conversation.target
            assert target is not None
            languages = [s.language for s in conversation.cut.supervisions if s.language]
            record = {
                "id": record_id(conversation), "key": self._key(conversation),
                "utterance": conversation.source_id, "task": target.task,
                "prompt_id": target.prompt_id, "prompt": target.prompt, "transcript": example.transcript,
                "language": languages[0] if languages else "en", "reference": target.response,
                "answer": answers[i] if answers else None, "choice": chosen[i],
            }  # fmt: skip
            yield record | label_of(conversation) | (asdict(forced[i]) if forced else {})

    def _choices(self, model: MTBISALM, system: System, reading: Reading) -> list[str | None]:
        """The most likely choice of each example whose task has choices, by log-likelihood of its tokens and the end of turn."""
        tokenizer, end = model.tokenizer.tokenizer, model.stop_ids()[-1:]
        scores: list[dict[str, float]] = [{} for _ in reading.examples]
        options = [self.choices(c) if system.teacher_forced else [] for c in reading.conversations]
        for place in range(max(map(len, options))):
            rows = [o[place % len(o)] if o else "" for o in options]
            if not any(rows):
                continue
            ids = [tokenizer.encode(r, add_special_tokens=False) + end for r in rows]
            for row, choice, value in zip(scores, rows, log_likelihoods(model, system, reading, ids), strict=True):
                row[choice] = value
        return [max(s, key=lambda c: s[c]) if o else None for s, o in zip(scores, options, strict=True)]


def record_id(conversation: MTBIConversation) -> str:
    """Identity of a conversation across systems."""
    assert conversation.target is not None
    return f"{conversation.source_id}/{conversation.target.task}/{conversation.target.prompt_id}"


def key_of(*parts: Any) -> str:
    """Short hash of what decides a system's answers."""
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def digest(path: Path) -> str:
    """Content hash of a file, or of the weights of an exported directory: all of it, since a connector is a small part."""
    value = hashlib.blake2b(digest_size=16)
    with open(path / "model.safetensors" if path.is_dir() else path, "rb") as stream:
        while block := stream.read(1 << 24):
            value.update(block)
    return value.hexdigest()


def summarize(
    records: dict[str, dict[str, dict[str, dict[str, Any]]]], tasks: dict[str, Task], baseline: str, resamples: int
) -> dict[str, Any]:
    """Scores of one set of cuts with intervals, by task, and paired tests.

    Args:
        records: ``[system][column][id]``; the topline's among them.
        tasks: the task library.
        baseline: system that the others are compared with.
        resamples: of the bootstrap.

    Returns:
        ``[column][system]`` -> :func:`entries`.
    """
    columns = list(dict.fromkeys(c for system in records.values() for c in system))
    result: dict[str, Any] = {}
    for column in columns:
        own = {name: system[column] for name, system in records.items() if column in system}
        topline = own[TOPLINE]
        scored = {
            name: {i: (r, measures(r, topline[i], tasks[r["task"]])) for i, r in rows.items()}
            for name, rows in own.items()
        }
        result[column] = entries(scored, baseline, resamples)
    return result


def summarize_labels(records: dict[str, dict[str, dict[str, Any]]], baseline: str, resamples: int) -> dict[str, Any]:
    """Scores against labels: ``[system][id]`` -> :func:`entries`."""
    scored = {name: {i: (r, label_measures(r)) for i, r in rows.items()} for name, rows in records.items()}
    return entries(scored, baseline, resamples)


def entries(scored: dict[str, Scored], baseline: str, resamples: int) -> dict[str, Any]:
    """Scores of every system.

    Returns:
        ``[system]`` -> ``answers``, ``missing`` (the audio could not be read), ``scores`` (value, low, high), ``by_task``, and
        ``against`` the baseline, over the answers that both have.
    """
    asked = {i for rows in scored.values() for i in rows}
    utterances = {r["utterance"] for rows in scored.values() for r, _ in rows.values()}
    bootstrap = Bootstrap(sorted(utterances), resamples)
    result: dict[str, Any] = {}
    for name, rows in scored.items():
        by_task: dict[str, Scored] = defaultdict(dict)
        for key, (record, values) in rows.items():
            by_task[record["task"]][key] = (record, values)
        result[name] = {
            "answers": len(rows), "missing": len(asked) - len(rows),
            "scores": {
                m: dict(zip(("value", "low", "high"), (s.value, *bootstrap.interval(s)), strict=True))
                for m, s in totals(rows).items()
            },
            "by_task": {t: {m: s.value for m, s in totals(own).items()} for t, own in sorted(by_task.items())},
        }  # fmt: skip
        if name != baseline and baseline in scored:
            both = rows.keys() & scored[baseline].keys()
            ours, theirs = (totals({i: r for i, r in side.items() if i in both}) for side in (rows, scored[baseline]))
            result[name]["against"] = {m: bootstrap.compare(ours[m], theirs[m]) for m in ours if m in theirs}
    return result


def totals(rows: Scored) -> dict[str, Sums]:
    """Sums of each measure by utterance."""
    values: dict[str, dict[str, list[Measure]]] = defaultdict(lambda: defaultdict(list))
    for record, own in rows.values():
        for measure, value in own.items():
            values[measure][record["utterance"]].append(value)
    return {m: sums_of(m, by_utterance) for m, by_utterance in values.items()}


@torch.no_grad()
def seconds_to_first_token(
    model: MTBISALM, cuts: CutSet, prompt: str, count: int, asr: WhisperASR | None
) -> dict[str, float]:
    """Median seconds from the waveform in memory to the first token, one utterance at a time; systems take turns.

    The cascade (with ``asr``) transcribes, then the text LLM reads prompt and transcript. One utterance is a warm-up.
    """
    waveforms = [mono_samples(c, RATE) for _, c in zip(range(count + 1), cuts, strict=False)]

    def speech(waveform: Any) -> None:
        audio = torch.from_numpy(waveform)[None]
        model.generate([[model.user_turn(prompt)]], audio, torch.tensor([len(waveform)]), max_new_tokens=1)

    def cascade(waveform: Any) -> None:
        assert asr is not None
        turn = model.user_turn(prompt)
        text = turn["content"].replace(model.audio_locator_tag, asr.transcripts([waveform])[0])
        model.generate([[{**turn, "content": text}]], max_new_tokens=1)

    systems: dict[str, Callable[[Any], None]] = {"speech LLM": speech} | ({CASCADE: cascade} if asr else {})
    seconds: dict[str, list[float]] = defaultdict(list)
    for waveform in waveforms:
        for name, run in systems.items():
            begin = time.perf_counter()
            run(waveform)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}
