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
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet

from nemo_mtbi.data import jsonl
from nemo_mtbi.data.conversation import MTBIConversation
from nemo_mtbi.evaluation.asr import RATE, WhisperASR
from nemo_mtbi.evaluation.metrics import Measure, measures
from nemo_mtbi.evaluation.statistics import Bootstrap, Sums
from nemo_mtbi.evaluation.systems import Questions, Reading, System, against_the_text_llm, log_likelihoods, readings
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.targets import workers
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.tasks.library import Task

SEEN_PROMPTS, UNSEEN_PROMPTS, UNSEEN_TASKS = COLUMNS = ("seen_prompts", "unseen_prompts", "unseen_tasks")
TOPLINE, CASCADE = "text_topline", "cascade"


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
        tasks: the task library.
        max_new_tokens, batch_size: of generation.
    """

    def __init__(self, folder: Path, key: str, tasks: dict[str, Task], max_new_tokens: int, batch_size: int) -> None:
        self.folder, self.key, self.tasks = folder, key, tasks
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @torch.no_grad()
    def predict(self, name: str, model: MTBISALM, system: System, questions: Questions) -> dict[str, dict[str, Any]]:
        """Records by conversation id; ``name`` is the file's."""
        file = self.folder / f"{name}.jsonl"
        jsonl.repair(file)
        done = {r["id"]: r for r in jsonl.read(file) if r["key"] == self.key}
        wanted = {record_id(c): c for c in questions.conversations}
        missing = [c for i, c in wanted.items() if i not in done]
        title = f"{self.folder.name}: {name}"
        with jsonl.Appender(file) as out:
            for reading in readings(system, questions, missing, self.batch_size, title):
                for record in self._records(model, system, reading):
                    out.write(record)
                    done[record["id"]] = record
        return {i: done[i] for i in wanted if i in done}

    def _records(self, model: MTBISALM, system: System, reading: Reading) -> Iterable[dict[str, Any]]:
        tokenizer = model.tokenizer.tokenizer
        forced = against_the_text_llm(model, system, reading)
        answers = system.answers(reading, self.max_new_tokens)
        chosen = self._choices(model, system, reading)
        for i, (conversation, example) in enumerate(zip(reading.conversations, reading.examples, strict=True)):
            target = conversation.target
            assert target is not None
            languages = [s.language for s in conversation.cut.supervisions if s.language]
            yield {
                "id": record_id(conversation), "key": self.key, "utterance": conversation.source_id, "task": target.task,
                "prompt_id": target.prompt_id, "prompt": target.prompt, "transcript": example.transcript,
                "language": languages[0] if languages else "en", "reference": target.response,
                "answer": tokenizer.decode(answers[i], skip_special_tokens=True).strip(),
                "tokens": forced[i].tokens, "agreed": forced[i].agreed, "kl": forced[i].kl, "choice": chosen[i],
            }  # fmt: skip

    def _choices(self, model: MTBISALM, system: System, reading: Reading) -> list[str | None]:
        """The most likely choice of each example whose task has choices, by log-likelihood of its tokens and the end of turn."""
        tokenizer, end = model.tokenizer.tokenizer, model.stop_ids()[-1:]
        scores: list[dict[str, float]] = [{} for _ in reading.examples]
        options = [self.tasks[e.task].choices for e in reading.examples]
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


def summarize(
    records: dict[str, dict[str, dict[str, dict[str, Any]]]], tasks: dict[str, Task], baseline: str, resamples: int
) -> dict[str, Any]:
    """Scores with intervals, by task, and paired tests.

    Args:
        records: ``[system][column][id]``, of one set; the topline's among them.
        tasks: the task library.
        baseline: system that the others are compared with.
        resamples: of the bootstrap.

    Returns:
        ``[column][system]`` -> ``{"scores": {measure: {value, low, high, answers}}, "by_task": ..., "against": ...}``; answers
        that a system lacks (its audio could not be read) are left out for it and counted in ``missing``.
    """
    result: dict[str, Any] = {}
    columns = list(dict.fromkeys(c for system in records.values() for c in system))
    for column in columns:
        own = {name: system[column] for name, system in records.items() if column in system}
        topline = own[TOPLINE]
        bootstrap = Bootstrap(sorted({r["utterance"] for r in topline.values()}), resamples)
        sums = {name: _sums(rows, topline, tasks) for name, rows in own.items()}
        result[column] = {}
        for name, (total, by_task) in sums.items():
            scores = {
                m: dict(zip(("value", "low", "high"), (s.ratio, *bootstrap.interval(s)), strict=True)) for m, s in total.items()
            }  # fmt: skip
            entry = {
                "answers": len(own[name]), "missing": len(topline) - len(own[name]), "scores": scores,
                "by_task": {t: {m: s.ratio for m, s in values.items()} for t, values in by_task.items()},
            }  # fmt: skip
            if name != baseline and baseline in sums:
                shared = [m for m in total if m in sums[baseline][0]]
                entry["against"] = {m: bootstrap.compare(total[m], sums[baseline][0][m]) for m in shared}
            result[column][name] = entry
    return result


def _sums(
    rows: dict[str, dict[str, Any]], topline: dict[str, dict[str, Any]], tasks: dict[str, Task]
) -> tuple[dict[str, Sums], dict[str, dict[str, Sums]]]:
    total: dict[str, dict[str, Measure]] = defaultdict(dict)
    by_task: dict[str, dict[str, dict[str, Measure]]] = defaultdict(lambda: defaultdict(dict))
    for key, record in rows.items():
        task = record["task"]
        for measure, (above, below) in measures(record, topline[key], tasks[task]).items():
            for target in (total[measure], by_task[task][measure]):
                old = target.get(record["utterance"], (0.0, 0.0))
                target[record["utterance"]] = (old[0] + above, old[1] + below)
    sums = {m: Sums.of(values) for m, values in total.items()}
    return sums, {t: {m: Sums.of(v) for m, v in values.items()} for t, values in by_task.items()}


@torch.no_grad()
def seconds_to_first_token(
    model: MTBISALM, cuts: CutSet, prompt: str, count: int, asr: WhisperASR | None
) -> dict[str, float]:
    """Median seconds from the waveform in memory to the first token, one utterance at a time; systems take turns.

    The cascade (with ``asr``) transcribes, then the text LLM reads prompt and transcript. One utterance is a warm-up.
    """
    import numpy as np

    chosen = [c for _, c in zip(range(count + 1), cuts, strict=False)]
    waveforms = [c.resample(RATE).load_audio().mean(0).astype(np.float32) for c in chosen]

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
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
