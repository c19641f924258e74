"""One unit of work: the cuts of a shard with their answers.

Any number of processes may work on the same output folder.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut
from lhotse.cut.data import DataCut

from nemo_mtbi import console
from nemo_mtbi.corpus.index import Record
from nemo_mtbi.corpus.shards import Shard
from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.data.target import (
    IMPOSSIBLE,
    NO_SPEECH,
    TARGETS_FIELD,
    TEACHER_IDS_FIELD,
    TEACHER_LOG_PROBS_FIELD,
    Target,
    is_no_speech,
)
from nemo_mtbi.errors import ShardError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.array_storage import RawChunkyWriter
from nemo_mtbi.targets.answers import AnswerFile, AnswerIndex
from nemo_mtbi.targets.config import TargetsConfig, decoded_by
from nemo_mtbi.targets.decoder import Answer, Request
from nemo_mtbi.targets.draw import Job, PromptDrawer
from nemo_mtbi.targets.engine import Engine
from nemo_mtbi.targets.filters import Candidate, Readings, asked_label, choose_filters, misread

CHUNK = 1024  # requests that an engine gets together
# Settings that change how answers are come by, and not what is written.
OPERATIONAL = (
    "cuts",
    "output_dir",
    "batch_size",
    "executor",
    "workers",
    "ray",
    "shard_cuts",
    "openai",
    "vllm",
    "max_duplicates",
    "shar_dir",
    "shar_audio",
    "shar_size",
)
# Rejected without a filter: prompts that the LLM has no room for, and cuts that nothing can be asked about.
CONTEXT, NO_TRANSCRIPT = "context", "no_transcript"


@dataclass
class ShardStatus:
    """What a finished shard holds; ``digest`` is of the input lines and of everything that decides the output,
    ``readings`` are for :class:`~nemo_mtbi.targets.filters.OneSided`, ``sizes`` of its files, in bytes."""

    digest: str
    kept: int = 0
    response_tokens: int = 0
    seconds: float = 0.0
    prompts: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    readings: Readings = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def settings_of(config: TargetsConfig, drawer: PromptDrawer) -> str:
    """Everything besides the input that decides what is written."""
    settings = {k: v for k, v in asdict(config).items() if k not in OPERATIONAL}
    tasks = [{k: v for k, v in asdict(t).items() if k != "answer" or v is not None} for t in drawer.tasks]
    template = str(drawer.tokenizer.tokenizer.chat_template)
    by: Any = config.engine != "hf" and decoded_by(config)  # False: as it was before there were others
    further: list[Any] = [own for own in (context_limit(config),) if own is not None]
    further += [drawer.dialect] if drawer.dialect != config.prompt_format else []
    return json.dumps([settings, tasks, drawer.teacher, template, by, *further])


def context_limit(config: TargetsConfig) -> int | None:
    """Positions that the engine has for prompt and answer, where its configuration says so."""
    return {"openai": config.openai.context_tokens, "vllm": config.vllm.max_model_len}.get(config.engine)


class ShardWriter:
    """Answers shards and writes their cuts.

    Args:
        config, drawer: what is asked.
        engine: makes the engine when the first answer is missing.
        index: answers of other shards and earlier runs.

    Attributes:
        advance: told how many cuts of a shard are answered; 0 when it is finished.
    """

    def __init__(self, config: TargetsConfig, drawer: PromptDrawer, engine: "LazyEngine", index: AnswerIndex) -> None:
        self.config, self.drawer, self.engine, self.index = config, drawer, engine, index
        self.filters = choose_filters(config.filters)
        self.folder = Path(config.output_dir)
        self.settings = settings_of(config, drawer)
        self.advance: Callable[[float], Any] = lambda cuts: None

    def digest(self, shard: Shard) -> str:
        return hashlib.blake2b((shard.digest + self.settings).encode(), digest_size=12).hexdigest()

    def paths(self, shard: Shard) -> dict[str, Path]:
        stem = self.folder / "shards" / shard.name / shard.label
        kinds = ("answers.jsonl", "cuts.jsonl", "rejected.jsonl", "json", "lock")
        return {kind: stem.with_name(f"{shard.label}.{kind}") for kind in kinds}

    def status(self, shard: Shard) -> ShardStatus | None:
        """The status of a shard that is finished with these settings and this input; None otherwise."""
        paths = self.paths(shard)
        try:
            status = ShardStatus(**json.loads(paths["json"].read_text()))
            same = status.digest == self.digest(shard)
            whole = all(paths[kind].stat().st_size == size for kind, size in status.sizes.items())
        except (FileNotFoundError, ValueError, TypeError):  # being written anew, or cut off by a machine that died
            return None
        return status if same and whole else None

    def write(self, shard: Shard) -> ShardStatus:
        """Answer what is missing, then write cuts, rejected answers and status."""
        start, paths = time.time(), self.paths(shard)
        cuts = list(shard.cuts())
        if repeated := [i for i, n in Counter(c.id for c in cuts).items() if n > 1]:
            raise ShardError(f"{shard.path} holds the cut {repeated[0]!r} more than once; ids must be unique.")
        if mixed := next((c for c in cuts if not isinstance(c, DataCut)), None):
            raise ShardError(
                f"{shard.path} holds a {type(mixed).__name__}; targets need MonoCut or MultiCut. "
                "Save mixed cuts as recordings first (CutSet.save_audios)."
            )
        top_k, temperature = self.config.top_k, self.config.temperature
        with AnswerFile(paths["answers.jsonl"], top_k, temperature, self.index.run) as answers:

            def prepared(requests: list[Request]) -> dict[str, str]:
                self._answer(self._within_context(requests), answers, f"{shard.name} {shard.label}, preparing turns")
                records = {r.key: answers.records[r.key] for r in requests if r.key in answers.records}
                whole = has_first_line if "truncated" in self.config.filters else bool
                return {key: record["response"] for key, record in records.items() if whole(record)}

            values = self.drawer.prepare(cuts, shard.name, prepared)
            jobs = [job for cut in cuts for job in self.drawer.jobs(cut, shard.name, values)]
            requests = self._within_context([j.request for j in jobs if j.problem is None and j.answer is None])
            self._give(jobs, answers)
            self._answer(requests, answers, f"{shard.name} {shard.label}", len(cuts))
            paths["json"].unlink(missing_ok=True)  # from here on it does not describe what is there
            status = self._write(shard, cuts, jobs, answers)
        status.seconds = round(time.time() - start, 2)
        status.sizes = {kind: paths[kind].stat().st_size for kind in ("cuts.jsonl", "rejected.jsonl")}
        jsonl.write_json(paths["json"], asdict(status))
        self.advance(0)
        return status

    def _within_context(self, requests: list[Request]) -> list[Request]:
        limit = self.engine.context_tokens
        return [r for r in requests if limit is None or len(r.prompt_ids) + r.max_new_tokens <= limit]

    def _answer(self, requests: list[Request], answers: AnswerFile, title: str, cuts: int = 0) -> None:
        """Answer what is missing; ``cuts`` have all these requests."""
        unique = sorted({r.key: r for r in requests}.values(), key=lambda r: (len(r.prompt_ids), r.key))
        missing = [r.key for r in unique if not answers.has(r.key)]
        if missing:
            answers.copy(list(self.index.find(missing, self.config.top_k, self.config.temperature)))
            missing = [key for key in missing if not answers.has(key)]
        if not missing:
            return
        bar = console.progress(
            total=len(missing),
            desc=title,
            unit="answer",
            smoothing=0.1,
        )
        with bar:
            ready = len(unique) - len(missing)
            # Chunks are cut from all requests: a continued run batches what is left as the first one did.
            for begin in range(0, len(unique), CHUNK):
                chunk = [r for r in unique[begin : begin + CHUNK] if not answers.has(r.key)]
                if not chunk:
                    continue
                finished: list[tuple[Answer, str]] = []
                engine = self.engine.get()
                for answer in engine.generate(chunk, self.config.top_k, self.config.temperature):
                    finished.append((answer, self.decode(answer.response_ids)))
                    bar.update()
                    ready += 1
                    self.advance(cuts * ready / len(unique))
                    if engine.independent:
                        answers.add(finished)
                        finished = []
                if finished:
                    answers.add(finished)

    def _give(self, jobs: list[Job], answers: AnswerFile) -> None:
        """The answers that are fixed, as the text LLM's would stand there; the teacher is sure of each token."""
        tokenizer = self.drawer.tokenizer.tokenizer
        for job in jobs:
            if job.answer is None or answers.has(job.request.key):
                continue
            ids = [*literal_encoding(tokenizer, job.answer)[0], self.drawer.end_of_turn]
            chosen = torch.tensor(ids)[:, None]
            others = torch.arange(self.config.top_k)[None].expand(len(ids), -1)
            others = torch.where(others == chosen, self.config.top_k, others)[:, : max(0, self.config.top_k - 1)]
            top = torch.cat([chosen, others], 1)[:, : self.config.top_k].int()
            log_probs = torch.full(top.shape, IMPOSSIBLE).half()
            log_probs[:, :1] = 0.0
            answers.add([(Answer(job.request.key, ids, True, top, log_probs), job.answer)])

    def decode(self, ids: list[int]) -> str:
        return self.drawer.tokenizer.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _write(self, shard: Shard, cuts: list[Cut], jobs: list[Job], answers: AnswerFile) -> ShardStatus:
        by_cut: dict[str, list[Job]] = {}
        for job in jobs:
            by_cut.setdefault(job.cut_id, []).append(job)
        status = ShardStatus(self.digest(shard))
        prompts: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        side: list[Record] = []
        lines: list[dict[str, Any]] = []
        for cut in cuts:
            kept: list[Target] = []
            if not transcript(cut) and not is_no_speech(cut):
                rejected[NO_TRANSCRIPT] += 1
                side.append(
                    rejected_record(shard.name, cut.id, "", "", NO_TRANSCRIPT, "the cut has no transcript", None)
                )
            for job in by_cut.get(cut.id, []):
                record = answers.records.get(job.request.key)
                reason = self._reject(job, record)
                if record is not None and job.problem is None and job.described is not None:
                    self._count_reading(status.readings, job, record)
                if reason is not None:
                    rejected[reason[0]] += 1
                    side.append(rejected_record(shard.name, cut.id, job.task, job.prompt_id, *reason, record))
                    continue
                assert record is not None
                begin = sum(len(t.response_ids) for t in kept) if self.config.top_k else -1
                kept.append(self._target(job, record, begin))
                prompts[f"{job.task}/{job.prompt_id}"] += 1
                status.response_tokens += len(record["response_ids"])
            status.kept += len(kept)
            for stale in (TEACHER_IDS_FIELD, TEACHER_LOG_PROBS_FIELD):
                (cut.custom or {}).pop(stale, None)
            lines.append(cut.to_dict())
            lines[-1]["custom"] = {**lines[-1].get("custom", {}), TARGETS_FIELD: [t.to_dict() for t in kept]}
        if self.config.top_k:
            self._write_top_k(self.arrays_path(shard), cuts, lines, answers)
        paths = self.paths(shard)
        status.prompts, status.rejected = dict(prompts), dict(rejected)
        jsonl.write_text(paths["rejected.jsonl"], "".join(jsonl.dumps(r) + "\n" for r in side))
        jsonl.write_text(paths["cuts.jsonl"], "".join(jsonl.dumps(line) + "\n" for line in lines))
        return status

    def arrays_path(self, shard: Shard) -> Path:
        """Top-k of a shard's targets. Other answers go to another file, so the manifest of an earlier run stays
        readable until the merge replaces it."""
        return self.folder / "teacher" / f"{shard.name}.{shard.label}-{self.digest(shard)[:12]}.bin"

    def _target(self, job: Job, record: Record, begin: int) -> Target:
        return Target(
            key=job.request.key,
            task=job.task,
            prompt_id=job.prompt_id,
            prompt=job.prompt,
            response=record["response"],
            response_ids=record["response_ids"],
            finished=record["finished"],
            rendering=self.drawer.rendering,
            teacher_begin=begin,
            teacher_temperature=self.config.temperature,
            described=job.described.text if job.described else "",
            positions=list(job.positions),
        )

    def _write_top_k(self, path: Path, cuts: list[Cut], lines: list[dict[str, Any]], answers: AnswerFile) -> None:
        temporary = path.with_name(f".{path.name}")
        with RawChunkyWriter(temporary, mode="wb", named=path) as arrays:
            for cut, line in zip(cuts, lines, strict=True):
                tops = [answers.top_k_of(t["key"]) for t in line["custom"][TARGETS_FIELD]]
                for field_name, part in ((TEACHER_IDS_FIELD, 0), (TEACHER_LOG_PROBS_FIELD, 1)):
                    if tops:
                        value = np.concatenate([t[part] for t in tops])
                        line["custom"][field_name] = arrays.store_array(f"{cut.id}-{field_name}", value).to_dict()
        temporary.replace(path)

    def _reject(self, job: Job, record: Record | None) -> tuple[str, str] | None:
        if job.problem is not None:
            return job.problem
        if job.answer is not None:
            return None if job.task == NO_SPEECH or record is None else self._reject_given(job, record)
        if record is None:
            return CONTEXT, f"prompt of {len(job.request.prompt_ids)} tokens and {job.request.max_new_tokens} new ones"
        candidate = self._candidate(job, record)
        for filter_name, check in self.filters:
            if (why := check(candidate)) is not None:
                return filter_name, why
        return None

    def _count_reading(self, readings: Readings, job: Job, record: Record) -> None:
        """Whether a question about one attribute was answered rightly, whatever filters there are."""
        candidate = self._candidate(job, record)
        if (label := asked_label(candidate.task, candidate.described)) is not None:
            asked = readings.setdefault(f"{job.task}/{job.prompt_id}", {}).setdefault(label, [0, 0])
            asked[0] += 1
            asked[1] += record["finished"] and misread(candidate) is None

    def _candidate(self, job: Job, record: Record) -> Candidate:
        return Candidate(
            task=self.drawer.by_name[job.task],
            transcript=job.transcript,
            response=record["response"],
            response_ids=record["response_ids"],
            finished=record["finished"],
            values=job.values,
            prompt_tokens=len(job.request.prompt_ids),
            languages=job.languages,
            max_total_tokens=self.config.max_total_tokens,
            described=job.described,
        )

    def _reject_given(self, job: Job, record: Record) -> tuple[str, str] | None:
        """Why an answer that a task gives cannot be trained on."""
        prompt, answer = len(job.request.prompt_ids), len(record["response_ids"])
        context, most = self.engine.context_tokens, self.config.max_total_tokens
        if not record["response"].strip():
            return "empty", "the answer that the task gives is empty"
        if answer > job.request.max_new_tokens:
            return (
                "truncated",
                f"the answer has {answer} tokens, of {job.request.max_new_tokens} that the task may have",
            )
        if context is not None and prompt + answer > context:
            return CONTEXT, f"prompt of {prompt} tokens and an answer of {answer}"
        if most is not None and prompt + answer > most:
            return "too_long", f"{prompt + answer} tokens, max_total_tokens={most}"
        return None


def has_first_line(record: Record) -> bool:
    """Whether the first line of an answer is whole: all of it is, or another line follows."""
    return record["finished"] or "\n" in record["response"].strip()


def rejected_record(
    manifest: str, cut: str, task: str, prompt_id: str, name: str, reason: str, record: Record | None
) -> Record:
    """One line of ``rejected.jsonl``."""
    return {
        "manifest": manifest,
        "cut": cut,
        "task": task,
        "prompt_id": prompt_id,
        "filter": name,
        "reason": reason,
        "response": record["response"] if record else "",
    }


class LazyEngine:
    """An engine that loads its LLM only if an answer is missing."""

    def __init__(self, config: TargetsConfig, drawer: PromptDrawer) -> None:
        from transformers import AutoConfig

        self.config, self.drawer = config, drawer
        self.engine: Engine | None = None
        self.context_tokens: int | None = getattr(
            AutoConfig.from_pretrained(drawer.llm).get_text_config(), "max_position_embeddings", None
        )
        if (own := context_limit(config)) is not None:
            self.context_tokens = own

    def get(self) -> Engine:
        if self.engine is None:
            if self.config.engine == "openai":
                from nemo_mtbi.targets.openai_engine import OpenAIEngine  # start-up

                server = replace(self.config.openai, model=self.config.name_on_server)
                self.engine = OpenAIEngine(server, self.drawer.tokenizer.tokenizer, self.drawer.end_of_turn)
            elif self.config.engine == "vllm":
                from nemo_mtbi.targets.vllm_engine import VLLMEngine  # start-up

                self.engine = VLLMEngine(self.config, self.drawer.tokenizer.tokenizer, self.drawer.llm)
            else:
                from nemo_mtbi.targets.engine import HFEngine  # start-up

                self.engine = HFEngine(self.config.llm, self.config.dtype, self.config.batch_size)
        return self.engine
