"""Stage one of behavior imitation: the text LLM answers task prompts on the transcripts; answers go into the cuts.

Files under ``output_dir``:

- ``<name>.jsonl``: the input cuts with ``custom["targets"]``, for ``input_cfg`` type ``mtbi``.
- ``teacher/*.bin``: top-k log-probabilities (Lhotse arrays), if ``top_k`` > 0.
- ``rejected/<name>.jsonl``: answers that a filter rejected, with the reason.
- ``manifest.json``: what was generated, with what, and the counts; ``report.html``: the same to look at, with examples.
- ``shards/<name>/``: every answer, by content key, and the parts that the files above are merged from.
"""

import errno
import time
from pathlib import Path

from filelock import FileLock, Timeout

from nemo_mtbi.data import jsonl
from nemo_mtbi.data.conversation import check_manifest
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.targets.answers import AnswerIndex
from nemo_mtbi.targets.config import ENGINES, TargetsConfig
from nemo_mtbi.targets.draw import PromptDrawer
from nemo_mtbi.targets.filters import choose_filters
from nemo_mtbi.targets.merge import merge_manifest, run_manifest
from nemo_mtbi.targets.plan import Shard, plan_manifest
from nemo_mtbi.targets.report import write_report
from nemo_mtbi.targets.shards import LazyEngine, ShardWriter

POLL_SECONDS = 0.5
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class TargetGenerator:
    """Runs the stage for a :class:`TargetsConfig`; several may run at once on one ``output_dir``.

    Raises:
        ConfigError, DataError: before any weight is loaded, if the configuration or a manifest cannot work.
    """

    def __init__(self, config: TargetsConfig, position: int = 0) -> None:
        if not config.cuts:
            raise ConfigError(
                "Name the manifests to answer: cuts={train: cuts.train.jsonl, held_out: cuts.held_out.jsonl}."
            )
        if config.engine not in ENGINES:
            raise ConfigError(f"engine={config.engine!r}: use {' or '.join(ENGINES)}.")
        self.config = config
        choose_filters(config.filters)
        for path in config.cuts.values():
            check_manifest(path)
        self.drawer = PromptDrawer(config)
        self.folder = Path(config.output_dir)
        self.engine = LazyEngine(config, self.drawer)
        self.shards: dict[str, list[Shard]] = {
            name: plan_manifest(name, path, self.folder / "shards" / name, config.shard_cuts)
            for name, path in config.cuts.items()
        }
        self.writer = ShardWriter(config, self.drawer, self.engine, AnswerIndex(self.folder / "shards"), position)

    def run(self) -> dict[str, Path]:
        """Generate what is missing and merge; returns the written manifests by name.

        Raises:
            DataError: no answer is left after filtering.
        """
        self.work()
        return self.merge()

    def work(self) -> None:
        """Take shards that nobody holds until all are finished. A shard whose worker died is taken over."""
        waiting = [s for shards in self.shards.values() for s in shards]
        while waiting := [s for s in waiting if self.writer.status(s) is None]:
            took_one = False
            for shard in waiting:
                lock = FileLock(self.writer.paths(shard)["lock"], blocking=False)
                try:
                    with lock:
                        if self.writer.status(shard) is None:
                            self.writer.write(shard)
                    took_one = True
                except Timeout:
                    continue
                except OSError as error:
                    if error.errno not in UNWRITABLE:
                        raise
                    raise DataError(
                        f"Cannot write shard {shard.label} of {shard.name} under {self.folder}: {error}. "
                        "Make room (or fix the path); the same command continues where this one stopped."
                    ) from error
            if not took_one:
                time.sleep(POLL_SECONDS)

    def merge(self) -> dict[str, Path]:
        """The final files, from finished shards."""
        counts = {name: merge_manifest(name, s, self.writer, self.config) for name, s in self.shards.items()}
        written = {name: self.folder / f"{name}.jsonl" for name in self.shards}
        manifest = run_manifest(self.config, self.drawer, counts)
        jsonl.write_json(self.folder / "manifest.json", manifest)
        rejected = [self.folder / "rejected" / f"{name}.jsonl" for name in self.shards]
        write_report(self.folder / "report.html", manifest, written, rejected)
        return written
