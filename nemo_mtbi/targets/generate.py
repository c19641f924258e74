"""Stage one of behavior imitation: the text LLM answers task prompts on the transcripts; answers go into the cuts.

Files under ``output_dir``:

- ``responses.jsonl``: every answer, keyed by content; a killed run continues after the last complete line.
- ``teacher/*.bin``: top-k log-probabilities (Lhotse arrays), if ``top_k`` > 0.
- ``rejected.jsonl``: answers that a filter rejected, with the reason.
- ``<name>.jsonl``: the input cuts with ``custom["targets"]``, for ``input_cfg`` type ``mtbi``.
- ``manifest.json``: what was generated, with what, and the counts; ``report.html``: the same to look at, with examples.
"""

import hashlib
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.tokenizers import AutoTokenizer
from tqdm import tqdm

from nemo_mtbi.data import jsonl
from nemo_mtbi.data.array_storage import RawChunkyWriter
from nemo_mtbi.data.conversation import check_manifest, transcript
from nemo_mtbi.data.messages import user_message
from nemo_mtbi.data.rendering import PromptRenderer, Spoken
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.decoder import Answer, Request
from nemo_mtbi.targets.engine import HFEngine
from nemo_mtbi.targets.filters import Candidate, choose_filters
from nemo_mtbi.targets.record import TARGETS_FIELD, TEACHER_IDS_FIELD, TEACHER_LOG_PROBS_FIELD, Target
from nemo_mtbi.targets.report import write_report
from nemo_mtbi.tasks.library import Task, load_library, render_template, select_tasks

LIBRARIES = ("nemo_toolkit", "transformers", "torch", "lhotse")


@dataclass(frozen=True)
class Job:
    """One answer to get: its request and what the target will say about it."""

    request: Request
    cut_id: str
    transcript: str
    task: str
    prompt_id: str
    prompt: str
    values: dict[str, Any]


class TargetGenerator:
    """Runs the stage for a :class:`TargetsConfig`."""

    def __init__(self, config: TargetsConfig) -> None:
        if not config.cuts:
            raise ConfigError(
                "Name the manifests to answer: cuts={train: cuts.train.jsonl, held_out: cuts.held_out.jsonl}."
            )
        self.config = config
        self.filters = choose_filters(config.filters)
        self.tasks: list[Task] = select_tasks(load_library(config.task_folders), config.task_names)
        self.by_name = {t.name: t for t in self.tasks}
        for path in config.cuts.values():
            check_manifest(path)
        llm = resolve_pretrained(config.llm)
        self.teacher = fingerprint(llm)
        self.rendering = Target.rendering_of(config.prompt_format, config.speech_position, self.teacher)
        self.tokenizer = AutoTokenizer(llm, use_fast=True)
        self.renderer = PromptRenderer(self.tokenizer, PromptFormatter.resolve(config.prompt_format))
        self.renderer.render(
            [user_message("Repeat.", Spoken("Some words."), config.speech_position)]
        )  # fails early, if at all
        self.folder = Path(config.output_dir)
        self.engine: HFEngine | None = None

    def run(self) -> dict[str, Path]:
        """Generate what is missing; returns the written manifests by name.

        Raises:
            DataError: no answer is left after filtering.
        """
        start, written = time.time(), {}
        rejected: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for name, path in self.config.cuts.items():
            cuts = list(CutSet.from_file(path))
            values = self._prepare(cuts, name)
            jobs = [job for cut in cuts for job in self.jobs(cut, name, values)]
            answers = self._answer([j.request for j in jobs], f"answers ({name})")
            written[name] = self._write(name, cuts, jobs, answers, rejected, counts)
        manifest = self._manifest(rejected, counts, time.time() - start)
        jsonl.write_json(self.folder / "manifest.json", manifest)
        write_report(self.folder / "report.html", manifest, written, self.folder / "rejected.jsonl")
        return written

    def tasks_of(self, cut: Cut, name: str) -> list[Task]:
        """Tasks drawn for one cut, seeded by its id."""
        count = min(self.config.tasks_per_cut.get(name, len(self.tasks)), len(self.tasks))
        return random.Random(f"{self.config.seed}/{cut.id}").sample(self.tasks, count)

    def _prepare(self, cuts: list[Cut], name: str) -> dict[tuple[str, str], dict[str, Any]]:
        """Values of the prompts' placeholders for each (cut, task): drawn ones, and answers to the preparing turns."""
        values: dict[tuple[str, str], dict[str, Any]] = {}
        waiting: list[tuple[Cut, Task]] = []
        for cut in cuts:
            for task in self.tasks_of(cut, name):
                rng = random.Random(f"{self.config.seed}/{cut.id}/{task.name}/values")
                values[cut.id, task.name] = {k: rng.choice(v) for k, v in task.variables.items()} | {
                    "choices": task.choices
                }
                if task.prepare:
                    waiting.append((cut, task))
        for turn in range(max((len(t.prepare) for _, t in waiting), default=0)):
            asked = [(c, t, t.prepare[turn]) for c, t in waiting if turn < len(t.prepare)]
            requests = [
                self._request(render_template(s.prompt, values[c.id, t.name]), require_transcript(c), s.max_new_tokens)
                for c, t, s in asked
            ]
            answers = self._answer(requests, f"preparing turns ({name})")
            for (cut, task, step), request in zip(asked, requests, strict=True):
                values[cut.id, task.name][step.variable] = one_line(answers[request.key]["response"])
        return values

    def jobs(self, cut: Cut, name: str, values: dict[tuple[str, str], dict[str, Any]]) -> list[Job]:
        """Prompts drawn for one cut, seeded by its id."""
        text = require_transcript(cut)
        split = self.config.splits.get(name, self.config.prompt_split)
        limit = self.config.max_new_tokens or max(t.max_new_tokens for t in self.tasks)
        jobs = []
        for task in self.tasks_of(cut, name):
            prompts = task.select(split, self.config.languages)
            rng = random.Random(f"{self.config.seed}/{cut.id}/{task.name}")
            count = self.config.prompts_per_task or len(prompts)
            for prompt in rng.sample(prompts, min(count, len(prompts))):
                filled = render_template(prompt.text, values[cut.id, task.name])
                request = self._request(filled, text, min(task.max_new_tokens, limit))
                jobs.append(Job(request, cut.id, text, task.name, prompt.id, filled, values[cut.id, task.name]))
        return jobs

    def _request(self, prompt: str, text: str, max_new_tokens: int) -> Request:
        message = user_message(prompt, Spoken(text), self.config.speech_position)
        ids = self.renderer.render([message]).ids
        # Everything that decides a greedy answer: the tokens of the prompt, the model, the budget.
        content = json.dumps([ids, self.teacher, self.config.dtype, max_new_tokens])
        return Request(hashlib.blake2b(content.encode(), digest_size=12).hexdigest(), ids, max_new_tokens)

    def _answer(self, requests: list[Request], title: str) -> dict[str, dict[str, Any]]:
        """Answers by key, generating those that ``responses.jsonl`` lacks."""
        path = self.folder / "responses.jsonl"
        jsonl.repair(path)
        done = {r["key"]: r for r in jsonl.read(path)}
        wanted_k = (self.config.top_k, self.config.temperature)
        have = {k for k, r in done.items() if self.config.top_k == 0 or r.get("top_k") == list(wanted_k)}
        missing = list({r.key: r for r in requests if r.key not in have}.values())
        if missing:
            self.engine = self.engine or HFEngine(self.config.llm, self.config.dtype, self.config.batch_size)
            with (
                jsonl.Appender(path) as out,
                RawChunkyWriter(self.folder / "teacher" / f"{self.teacher[:12]}.bin") as arrays,
                tqdm(total=len(missing), desc=title, unit="answer", smoothing=0.1) as bar,
            ):
                for answer in self.engine.generate(missing, self.config.top_k, self.config.temperature):
                    record = self._record(answer, arrays)
                    out.write(record)
                    done[answer.key] = record
                    bar.update()
        return done

    def _record(self, answer: Answer, arrays: RawChunkyWriter) -> dict[str, Any]:
        text = self.decode(answer.response_ids)
        record: dict[str, Any] = {
            "key": answer.key, "response_ids": answer.response_ids, "finished": answer.finished, "response": text
        }  # fmt: skip
        if answer.top_ids is not None and answer.top_log_probs is not None:
            record["top_k"] = [self.config.top_k, self.config.temperature]
            record["teacher"] = [
                arrays.storage_path,
                arrays.write("", answer.top_ids),
                arrays.write("", answer.top_log_probs),
            ]
            arrays.flush()
        return record

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _write(
        self, name: str, cuts: list[Cut], jobs: list[Job], answers: dict[str, dict[str, Any]], rejected: Counter[str],
        counts: Counter[str],
    ) -> Path:  # fmt: skip
        """Cuts with their kept targets; rejected answers go to ``rejected.jsonl`` with the reason."""
        by_cut: dict[str, list[Job]] = {}
        for job in jobs:
            by_cut.setdefault(job.cut_id, []).append(job)
        path = self.folder / f"{name}.jsonl"
        side = [r for r in jsonl.read(self.folder / "rejected.jsonl") if r["manifest"] != name]
        lines, kept_total = [], 0
        # A new file for each set of answers: an old manifest never points into rows of other answers.
        digest = hashlib.blake2b(
            "".join(j.request.key for j in jobs).encode() + repr(self.config.filters).encode(), digest_size=6
        )
        bin_file = self.folder / "teacher" / f"{name}-{digest.hexdigest()}.bin"
        with RawChunkyWriter(bin_file, mode="wb") as arrays:
            for cut in cuts:
                kept: list[Target] = []
                tops: list[tuple[np.ndarray, np.ndarray]] = []
                for job in by_cut.get(cut.id, []):
                    record = answers[job.request.key]
                    reason = self._reject(job, record)
                    if reason is not None:
                        rejected[reason[0]] += 1
                        side.append({
                            "manifest": name, "cut": cut.id, "task": job.task, "prompt_id": job.prompt_id, "filter": reason[0],
                            "reason": reason[1], "response": record["response"],
                        })  # fmt: skip
                        continue
                    begin = sum(len(t.response_ids) for t in kept) if self.config.top_k else -1
                    kept.append(
                        Target(
                            key=job.request.key,
                            task=job.task,
                            prompt_id=job.prompt_id,
                            prompt=job.prompt,
                            response=record["response"],
                            response_ids=record["response_ids"],
                            finished=record["finished"],
                            rendering=self.rendering,
                            teacher_begin=begin,
                            teacher_temperature=self.config.temperature,
                        )
                    )
                    counts[f"{job.task}/{job.prompt_id}"] += 1
                    counts["response_tokens"] += len(record["response_ids"])
                    if self.config.top_k:
                        tops.append(self._load_top_k(record))
                kept_total += len(kept)
                lines.append(self._with_targets(cut, kept, tops, arrays))
        if kept_total == 0:
            raise DataError(
                f"No answer is left for {name}: {len(jobs)} were generated and all rejected ({dict(rejected)}). "
                f"Look at {self.folder / 'rejected.jsonl'}, then change the filters, the tasks or the LLM."
            )
        jsonl.write_text(self.folder / "rejected.jsonl", "".join(jsonl.dumps(r) + "\n" for r in side))
        jsonl.write_text(path, "".join(jsonl.dumps(line) + "\n" for line in lines))
        for old in bin_file.parent.glob(f"{name}-*.bin"):
            if old != bin_file:
                old.unlink()
        return path

    def _reject(self, job: Job, record: dict[str, Any]) -> tuple[str, str] | None:
        candidate = Candidate(
            self.by_name[job.task],
            job.transcript,
            record["response"],
            record["response_ids"],
            record["finished"],
            job.values,
        )
        for filter_name, check in self.filters:
            if (why := check(candidate)) is not None:
                return filter_name, why
        return None

    @staticmethod
    def _load_top_k(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        from nemo_mtbi.data.array_storage import RawChunkyReader

        reader = RawChunkyReader(record["teacher"][0])
        return reader.read(record["teacher"][1]), reader.read(record["teacher"][2])

    @staticmethod
    def _with_targets(cut: Cut, kept: list[Target], tops: list[Any], arrays: RawChunkyWriter) -> dict[str, Any]:
        cut = cut.copy() if hasattr(cut, "copy") else cut
        cut.custom = dict(cut.custom or {}) | {TARGETS_FIELD: [t.to_dict() for t in kept]}
        if tops:
            for field_name, index in ((TEACHER_IDS_FIELD, 0), (TEACHER_LOG_PROBS_FIELD, 1)):
                value = np.concatenate([t[index] for t in tops])
                setattr(cut, field_name, arrays.store_array(f"{cut.id}-{field_name}", value))
        return cut.to_dict()

    def _manifest(self, rejected: Counter[str], counts: Counter[str], seconds: float) -> dict[str, Any]:
        tokens = counts.pop("response_tokens", 0)
        prompts: dict[str, dict[str, int]] = {}
        for key, value in sorted(counts.items()):
            task, prompt = key.split("/")
            prompts.setdefault(task, {})[prompt] = value
        return {
            "teacher": {
                "name": self.config.llm,
                "fingerprint": self.teacher,
                "prompt_format": self.config.prompt_format,
            },
            "decoding": {"method": "greedy", "dtype": self.config.dtype},
            "settings": {
                k: v for k, v in asdict(self.config).items() if k not in ("cuts", "output_dir", "llm", "dtype")
            },
            "top_k": self.config.top_k,
            "temperature": self.config.temperature,
            "targets": sum(counts.values()),
            "response_tokens": tokens,
            "targets_by_task_and_prompt": prompts,
            "rejected": dict(rejected),
            "wall_seconds": round(seconds, 1),
            "versions": {name: version(name) for name in LIBRARIES},
        }


def require_transcript(cut: Cut) -> str:
    """The transcript.

    Raises:
        DataError: there is none.
    """
    text = transcript(cut)
    if not text:
        raise DataError(f"Cut {cut.id} has no transcript. prepare_data.py leaves such cuts out.")
    return text


def one_line(text: str) -> str:
    """A prepared answer as it can stand inside a prompt: its first line without quotation marks."""
    lines = text.strip().splitlines()
    return lines[0].strip().strip("\"'“”").strip() if lines else ""
