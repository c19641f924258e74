"""Runs the frozen encoder once over a manifest and attaches its features to the cuts; with a frozen recognizer, also
what it writes of them.

In ``<manifest>.features`` each shard of the manifest has its ``.bin`` (Lhotse array storage, bfloat16) and
``.records.jsonl`` (progress). At the end the manifest's lines are rewritten with ``encoder_features``. A killed run
continues, features are found again when lines move; a cut whose audio or encoder changed is encoded again.
"""

import gc
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from lhotse.cut import Cut
from nemo.collections.speechlm2.modules import AudioPerceptionModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_mtbi import console
from nemo_mtbi.config import model_config, plain
from nemo_mtbi.corpus.execution import LOCAL, check_execution, spread
from nemo_mtbi.corpus.failures import explained
from nemo_mtbi.corpus.index import RecordIndex
from nemo_mtbi.corpus.ray_data import RayConfig
from nemo_mtbi.corpus.shards import Shard, plan_manifest
from nemo_mtbi.data.audio import collate_waveforms, mono_samples
from nemo_mtbi.data.audio_windows import WINDOW_SECONDS
from nemo_mtbi.data.conversation import check_manifest
from nemo_mtbi.data.feature_cache import (
    AUDIO_FIELD,
    KEY_FIELD,
    audio_identity,
    describes_features,
    features_key,
    windows_field,
    written_field,
)
from nemo_mtbi.data.perturbation import features_field, perturbed, speed_factors
from nemo_mtbi.errors import DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.array_storage import RawChunkyWriter, place_of
from nemo_mtbi.models.speech import cut_windows, encode
from nemo_mtbi.modules.perception import (
    encoder_key,
    freeze,
    frozen_recognizer,
    require_fixed_features,
    setup_perception,
)
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained
from nemo_mtbi.process import tune

FILE_BYTES = 8 * 2**30  # about the size of a file of features
SHARD_CUTS = 1024  # of one unit of work: they are in memory, and batches of like lengths are made of them
log = logging.getLogger(__name__)


class FrozenEncoder:
    """Preprocessor and encoder, without the LLM, and the connector's recognizer where it is frozen: what fills the
    feature cache.

    Attributes:
        key: of the features.
        writing_key: of the recognizer; None without one.

    Args:
        cfg: the ``model`` section of a configuration.
    """

    def __init__(self, cfg: DictConfig) -> None:
        config = model_config(cfg)
        self.given, self.cfg = cfg, DictConfig(plain(cfg))
        self.cfg.pretrained_weights = True
        self.cfg.perception.pop("fusion", None)  # what is cached comes before it
        self.cfg.perception.modality_adapter = {
            "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector"
        }
        self.llm = SimpleNamespace(config=SimpleNamespace(hidden_size=1))
        self.perception: Any = None
        setup_perception(self)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.perception = cast(AudioPerceptionModule, self.perception).to(self.device).eval()
        freeze(self.perception.named_parameters(prefix="perception"), config)
        require_fixed_features(self.perception)
        self.perception.encoder.to(getattr(torch, config.encoder_dtype))
        self.key = encoder_key(
            self.cfg.perception, fingerprint(resolve_pretrained(config.pretrained_asr)), config.encoder_dtype
        )
        recognizer = frozen_recognizer(self.cfg.perception, config)
        self.recognizer = None if recognizer is None else recognizer.to(self.device)
        self.writing_key = None if recognizer is None else recognizer.writing_key()
        self.sampling_rate: int = self.perception.preprocessor.featurizer.sample_rate

    def encode(self, audios: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        return encode(self.perception, audios.to(self.device), audio_lens.to(self.device))

    def write(self, features: Tensor, lengths: Tensor) -> list[list[int]] | None:
        """features (N, T, D) as they are kept, lengths (N,) -> the recognizer's tokens of each window, if any."""
        return None if self.recognizer is None else self.recognizer.write(features.float(), lengths)


@dataclass(frozen=True)
class Version:
    """A cut at one speed, and the key of its features."""

    cut: Cut
    key: str


@dataclass
class CacheReport:
    """What a run did: utterances encoded now, found in the cache, left out; bytes and hours of speech in the cache."""

    encoded: int = 0
    cached: int = 0
    skipped: int = 0
    bytes: int = 0
    hours: float = 0.0
    fresh: list[str] = field(default_factory=list)  # keys of a shard that is being worked on, as are its reasons
    reasons: list[dict[str, str]] = field(default_factory=list)

    def leave_out(self, cut: Cut, reason: str) -> None:
        self.skipped += 1
        self.reasons.append({"id": cut.id, "reason": reason})

    def add(self, other: "CacheReport") -> None:
        """Those of another shard."""
        for name in ("encoded", "cached", "skipped", "bytes", "hours"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, versions: list[Version], records: list[dict[str, Any]]) -> None:
        """A cut whose features are there."""
        self.bytes += sum(2 * int(np.prod(record["array"]["shape"])) for record in records)
        self.hours += sum(version.cut.duration for version in versions) / 3600


@dataclass
class ShardEncoder:
    """What a worker does: encodes what a shard lacks, and writes the shard's lines with their features.

    Attributes:
        encoder: whose features.
        folder: of the features.
        speeds: at which every cut is encoded.
        batch_seconds: audio encoded together.
        advance: told how many versions of cuts are done.
    """

    encoder: FrozenEncoder
    folder: Path
    speeds: Sequence[float]
    batch_seconds: float
    advance: Callable[[int], Any] = lambda done: None

    def __call__(self, shard: Shard) -> CacheReport:
        stem = self.folder / shard.label
        with explained(self.folder), FileLock(stem.with_suffix(".lock")):  # Ray may begin a lost shard again
            return self._shard(shard, stem)

    def _shard(self, shard: Shard, stem: Path) -> CacheReport:
        report, index = CacheReport(), RecordIndex(self.folder, lambda: ())
        versions = [(cut, _versions(cut, self.speeds, self.encoder.key)) for cut in shard.cuts()]
        with jsonl.Journal(stem.with_suffix(".records.jsonl"), lambda record: True, "key") as journal:
            there = Arrays()
            missing = [v for _, own in versions for v in own if not self._known(v, journal, index, there)]
            report.cached = sum(len(own) for _, own in versions) - len(missing)
            self.advance(report.cached)
            if missing:
                arrays = there.whole(stem.with_suffix(".bin"), journal)
                with RawChunkyWriter(arrays, max_bytes=FILE_BYTES) as writer:
                    for batch in _batches(missing, self.batch_seconds):
                        kept = _readable(batch, self.encoder.sampling_rate, report)
                        self._encode(kept, writer, journal, there, report)
                        self.advance(len(batch))
            finished = {v.key for _, own in versions for v in own} - {v.key for v in missing} | set(report.fresh)
            with jsonl.replacing(part_of(self.folder, shard, LINES), uuid.uuid4().hex) as out:
                for cut, own in versions:
                    if all(version.key in finished for version in own):
                        records = [journal[version.key] for version in own]
                        report.count(own, records)
                        out.write(jsonl.dumps(_with_features(cut, self.speeds, own, records)) + "\n")
        with jsonl.replacing(part_of(self.folder, shard, LEFT_OUT), uuid.uuid4().hex) as out:
            out.writelines(jsonl.dumps(reason) + "\n" for reason in report.reasons)
        report.fresh, report.reasons = [], []
        return report

    def _known(self, version: Version, journal: jsonl.Journal, index: RecordIndex, there: "Arrays") -> bool:
        """Whether the journal has it; what another shard's has, since cuts have moved, is noted here too."""
        if version.key in journal and there.holds(journal[version.key]):
            return self._complete(journal[version.key])
        for record, _ in index.places(version.key):
            if there.holds(record):
                journal.write(record)
                return self._complete(record)
        return False

    def _complete(self, record: dict[str, Any]) -> bool:
        """Whether all that is kept now is in a record with features."""
        return self.encoder.writing_key in (None, record.get("written", {}).get("by"))

    def _encode(
        self,
        read: list["Read"],
        writer: RawChunkyWriter,
        journal: jsonl.Journal,
        there: "Arrays",
        report: CacheReport,
    ) -> None:
        """Encode a batch; in halves where the memory does not suffice."""
        if not read:
            return
        encoded, problem = None, ""
        try:
            encoded = list(_encode(self.encoder, read))
        except torch.OutOfMemoryError as error:
            problem = str(error)  # and not the error, which holds what the batch takes
        if encoded is None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(read) == 1:
                report.leave_out(read[0].version.cut, f"OutOfMemoryError: {problem[:200]}")
                return
            for half in (read[: len(read) // 2], read[len(read) // 2 :]):
                self._encode(half, writer, journal, there, report)
            return
        for one in encoded:
            key, cut = one.version.key, one.version.cut
            if key in journal and there.holds(journal[key]):  # the features are; what is written of them was missing
                array = journal[key]["array"]
            else:
                array = writer.store_array(cut.id, one.features).to_dict()
                writer.flush()
            record = {"key": key, "array": array}
            if len(one.begins) > 1 or cut.duration > WINDOW_SECONDS:
                record["windows"] = one.begins
            if one.written is not None:
                record["written"] = {"by": self.encoder.writing_key, "tokens": one.written}
            journal.write(record)
            report.fresh.append(key)
            report.encoded += 1


class Arrays:
    """Whether the arrays that records point to are there; a file may have been deleted, or not copied."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def holds(self, record: dict[str, Any]) -> bool:
        begin, dtype, sizes = place_of(record["array"]["storage_key"])
        return begin + dtype.itemsize * int(np.prod(sizes)) <= self._size(record["array"]["storage_path"])

    def whole(self, path: Path, journal: jsonl.Journal) -> Path:
        """The file to append to: ``path``, unless it has lost what the journal says it holds, so that old records would
        point into new arrays; then another one."""
        records = (journal[key] for key in journal.places)
        if all(self.holds(r) for r in records if Path(r["array"]["storage_path"]).name == path.name):
            return path
        return path.with_suffix(f".{uuid.uuid4().hex[:8]}{path.suffix}")

    def _size(self, path: str) -> int:
        if path not in self.sizes:
            self.sizes[path] = Path(path).stat().st_size if Path(path).is_file() else -1
        return self.sizes[path]


LINES, LEFT_OUT = "cuts", "left_out"  # what a shard is finished with, until it is joined with the others'


def part_of(folder: Path, shard: Shard, kind: str) -> Path:
    return folder / f"{shard.label}.{kind}.jsonl"


def cache_features(
    encoder: FrozenEncoder | DictConfig,
    manifest: Path,
    batch_seconds: float = 120.0,
    perturb_speed: Iterable[float] = (),
    executor: str = LOCAL,
    workers: int = 1,
    ray: RayConfig | None = None,
) -> CacheReport:
    """Attach encoder features to every cut of a manifest (see the module's description).

    Args:
        encoder: whose features; as the ``model`` section of its configuration, each worker builds its own.
        manifest: CutSet (.jsonl or .jsonl.gz), rewritten in place under a temporary name.
        batch_seconds: audio encoded together.
        perturb_speed: factors of speed at which every cut is encoded too, for ``perturb_speed`` of training.
        executor, workers, ray: who works (:func:`nemo_mtbi.corpus.execution.spread`); the result is the same.

    Raises:
        ConfigError: an impossible factor or executor.
        DataError: there is no such manifest, no cut is left, or another command works on it.
    """
    speeds = (1.0, *speed_factors(perturb_speed))
    check_execution(executor, workers)
    check_manifest(str(manifest))
    folder = manifest.with_suffix(".features")
    folder.mkdir(exist_ok=True)
    with explained(folder), held(folder):
        before = version_of(manifest)
        shards = plan_manifest(manifest.stem, str(manifest), folder, SHARD_CUTS)
        if not shards:
            raise DataError(f"The manifest {manifest} is empty. Did the step that writes it finish?")
        for kind in (LINES, LEFT_OUT):  # of a run that was killed
            for old in folder.glob(f"*.{kind}.jsonl"):
                old.unlink()
        earlier = [file for file in (manifest.with_suffix(".features.jsonl"),) if file.exists()]  # before shards
        if earlier or any(folder.glob("*.records.jsonl")):
            RecordIndex(folder, lambda: [*earlier, *folder.glob("*.records.jsonl")]).open()
        report, workers = CacheReport(), min(workers, len(shards))
        total = sum(shard.lines for shard in shards) * len(speeds)
        with console.progress(total=total, desc="encoder features", unit="utt") as bar:
            if executor == LOCAL and workers == 1:
                own = FrozenEncoder(encoder) if isinstance(encoder, DictConfig) else encoder
                for shard in shards:
                    report.add(ShardEncoder(own, folder, speeds, batch_seconds, bar.update)(shard))
            else:
                model = encoder if isinstance(encoder, DictConfig) else encoder.given
                threads = max(1, (os.cpu_count() or 1) // workers) if executor == LOCAL else None
                make = partial(_worker, plain(model), folder, speeds, batch_seconds, threads)
                for found in spread(make, shards, executor, workers, ray or RayConfig(), fresh=True):
                    report.add(found)
                    bar.update(found.encoded + found.cached + found.skipped)
        _join(manifest, folder, shards, before)
    if report.skipped:
        log.warning(f"{report.skipped} left out of {manifest}; the reasons: {folder / f'{LEFT_OUT}.jsonl'}")
    return report


def _worker(
    model: dict[str, Any],
    folder: Path,
    speeds: Sequence[float],
    batch_seconds: float,
    threads: int | None,
    number: int,
) -> ShardEncoder:
    from nemo_mtbi import registration  # noqa: F401  our classes as targets of the configuration

    tune(threads)
    if torch.cuda.device_count():
        torch.cuda.set_device(number % torch.cuda.device_count())
    return ShardEncoder(FrozenEncoder(OmegaConf.create(model)), folder, speeds, batch_seconds)


def version_of(manifest: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = manifest.stat()
    return status.st_size, status.st_mtime_ns


def _join(manifest: Path, folder: Path, shards: list[Shard], before: tuple[int, int]) -> None:
    """The manifest, and the list of what is left out, from its shards' parts.

    Raises:
        DataError: nothing is left, or the manifest has been changed meanwhile; it stays as it is.
    """
    left_out = folder / f"{LEFT_OUT}.jsonl"
    _concatenate(left_out, [part_of(folder, shard, LEFT_OUT) for shard in shards])
    lines = [part_of(folder, shard, LINES) for shard in shards]
    if not any(part.stat().st_size for part in lines):
        raise DataError(
            f"Of {manifest} no cut could be encoded, so it stays as it was. The reasons: {left_out}; are the "
            "recordings where the manifest says?"
        )
    if version_of(manifest) != before:
        raise DataError(f"{manifest} has changed while it was worked on. Run the same command again.")
    _concatenate(manifest, lines)


def _concatenate(path: Path, parts: list[Path]) -> None:
    with jsonl.replacing(path, uuid.uuid4().hex) as out:
        for part in parts:
            with open(part, encoding="utf-8") as lines:
                out.writelines(lines)
    for part in parts:
        part.unlink()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """One command at a time.

    Raises:
        DataError: another one works on the folder.
    """
    try:
        with FileLock(folder / "cache.lock", blocking=False):
            yield
    except Timeout:
        raise DataError(f"Another command fills {folder}. Wait for it, or end it.") from None


def _versions(cut: Cut, speeds: Sequence[float], encoder_key: str) -> list[Version]:
    own = [perturbed(cut, factor) for factor in speeds]
    return [Version(version, features_key(version, encoder_key)) for version in own]


def _with_features(
    cut: Cut, speeds: Sequence[float], versions: list[Version], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The cut's line with the features of its versions, and without those that it had."""
    line = cut.to_dict()
    custom = {k: v for k, v in line.get("custom", {}).items() if not describes_features(k)}
    for speed, record in zip(speeds, records, strict=True):
        custom[features_field(speed)] = record["array"]
        if "windows" in record:
            custom[windows_field(features_field(speed))] = record["windows"]
        if "written" in record:
            custom[written_field(features_field(speed))] = record["written"]
    line["custom"] = custom | {KEY_FIELD: versions[0].key, AUDIO_FIELD: audio_identity(cut)}
    return line


def _batches(versions: list[Version], seconds: float) -> Iterator[list[Version]]:
    batch: list[Version] = []
    for version in sorted(versions, key=lambda v: v.cut.duration):
        if batch and version.cut.duration * (len(batch) + 1) > seconds:
            yield batch
            batch = []
        batch.append(version)
    if batch:
        yield batch


@dataclass(frozen=True)
class Read:
    """A version of a cut and its samples (S,)."""

    version: Version
    samples: np.ndarray


def _readable(versions: list[Version], sampling_rate: int, report: CacheReport) -> list[Read]:
    """Those whose audio can be read: one broken recording must not stop the run."""
    found = []
    for version in versions:
        try:
            found.append(Read(version, mono_samples(version.cut, sampling_rate)))
        except Exception as error:  # decoders raise their own types
            report.leave_out(version.cut, f"{type(error).__name__}: {str(error)[:200]}")
    return found


@dataclass(frozen=True)
class Encoded:
    """What is kept of a version of a cut: features (T, D), the frames at which their windows begin, and what the
    recognizer writes of each window.
    """

    version: Version
    features: Tensor
    begins: list[int]
    written: list[list[int]] | None


def _encode(encoder: FrozenEncoder, read: list[Read]) -> Iterator[Encoded]:
    waveforms = [one.samples for one in read]
    audios, lengths, windows = cut_windows(encoder.perception, *collate_waveforms(waveforms))
    features, counts = encoder.encode(audios, lengths)
    features = features.to(torch.bfloat16)
    written = encoder.write(features, counts)
    rows = [row[:count] for row, count in zip(features.cpu(), counts.tolist(), strict=True)]
    owners = range(len(read)) if windows is None else windows.owners
    parts: list[list[int]] = [[] for _ in read]
    for row, owner in enumerate(owners):
        parts[owner].append(row)
    for one, own in zip(read, parts, strict=True):
        begins = [0, *np.cumsum([len(rows[row]) for row in own[:-1]]).tolist()]
        texts = None if written is None else [written[row] for row in own]
        yield Encoded(one.version, torch.cat([rows[row] for row in own]), begins, texts)
