"""A shard of the feature cache: what of it is there, and what has to be encoded now."""

import gc
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from lhotse.array import Array
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from torch import Tensor

from nemo_mtbi.corpus.failures import explained, raise_if_of_the_machine, sources_of
from nemo_mtbi.corpus.index import RecordIndex
from nemo_mtbi.corpus.shards import Shard
from nemo_mtbi.data.audio import collate_waveforms, mono_samples
from nemo_mtbi.data.audio_windows import WINDOW_SECONDS
from nemo_mtbi.data.feature_cache import (
    AUDIO_FIELD,
    KEY_FIELD,
    SPAN_FIELD,
    WindowPlaces,
    audio_identity,
    describes_features,
    features_key,
    features_of,
    span_of,
    windows_field,
    written_field,
)
from nemo_mtbi.data.perturbation import features_field, perturbed
from nemo_mtbi.errors import DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.array_storage import FileSizes, RawChunkyWriter, end_of
from nemo_mtbi.models.speech import cut_windows
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder

Item = TypeVar("Item")
Result = TypeVar("Result")
FILE_BYTES = 8 * 2**30  # about the size of a file of features
LINES, LEFT_OUT = "cuts", "left_out"  # what a shard is finished with, until it is joined with the others'


def part_of(folder: Path, shard: Shard, kind: str) -> Path:
    return folder / f"{shard.label}.{kind}.jsonl"


@dataclass(frozen=True)
class Version:
    """A cut at one speed, and the key of its features."""

    cut: Cut
    key: str


@dataclass
class CacheReport:
    """What was done: utterances encoded now, found in the cache, left out; bytes and hours of speech in the cache."""

    encoded: int = 0
    cached: int = 0
    skipped: int = 0
    bytes: int = 0
    hours: float = 0.0

    def add(self, other: "CacheReport") -> None:
        """Those of another shard."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Known:
    """What is known of a shard's versions.

    Attributes:
        journal: records (``key``, ``array``, ``windows``, ``written``) by the key of a version.
        missing: versions to encode, because they have no record, or no array.
        unwritten: versions with features, of which it is not kept what the recognizer writes.
        finished: keys of the others; in the end, of all that are not left out.
        encoded: how many were missing, and are there now.
        reasons: of cuts that are left out.
    """

    journal: jsonl.Journal
    missing: list[Version] = field(default_factory=list)
    unwritten: list[Version] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    encoded: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def leave_out(self, version: Version, reason: str) -> None:
        self.reasons.setdefault(version.cut.id, reason)

    def note(self, record: dict[str, Any]) -> None:
        self.journal.write(record)
        self.finished.add(record["key"])


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
        report = CacheReport()
        cuts = list(shard.cuts())
        if mixed := next((cut for cut in cuts if not isinstance(cut, DataCut)), None):
            raise DataError(
                f"{shard.path} holds a {type(mixed).__name__}, {mixed.id}; features need MonoCut or MultiCut. Save "
                "mixed cuts as recordings first (CutSet.save_audios)."
            )
        versions = [(cut, _versions(cut, self.speeds, self.encoder.key)) for cut in cuts]
        with jsonl.Journal(stem.with_suffix(".records.jsonl"), lambda record: True, "key") as journal:
            known, there = Known(journal), Arrays()
            self._look_up([version for _, own in versions for version in own], known, there)
            report.cached = sum(len(own) for _, own in versions) - len(known.missing)
            self.advance(report.cached - len(known.unwritten))
            for batch in _batches(known.unwritten, self.batch_seconds):
                self._write(batch, known)
                self.advance(len(batch))
            if known.missing:
                with RawChunkyWriter(there.whole(stem.with_suffix(".bin"), journal), max_bytes=FILE_BYTES) as writer:
                    for batch in _batches(known.missing, self.batch_seconds):
                        self._encode(_readable(batch, self.encoder.sampling_rate, known), writer, known)
                        self.advance(len(batch))
            report.encoded, report.skipped = known.encoded, len(known.reasons)
            with jsonl.replacing(part_of(self.folder, shard, LINES), uuid.uuid4().hex) as out:
                for cut, own in versions:
                    if all(version.key in known.finished for version in own):
                        records = [journal[version.key] for version in own]
                        report.bytes += sum(2 * int(np.prod(record["array"]["shape"])) for record in records)
                        report.hours += sum(version.cut.duration for version in own) / 3600
                        out.write(jsonl.dumps(_with_features(cut, self.speeds, own, records)) + "\n")
        with jsonl.replacing(part_of(self.folder, shard, LEFT_OUT), uuid.uuid4().hex) as out:
            for cut, own in versions:
                if not all(version.key in known.finished for version in own):
                    reason = known.reasons.get(cut.id, "")
                    out.write(jsonl.dumps({"id": cut.id, "reason": reason, "cut": cut.to_dict()}) + "\n")
        return report

    def _look_up(self, versions: list[Version], known: Known, there: "Arrays") -> None:
        """Which versions are there; what another shard's journal has of them, since cuts have moved, is noted too."""
        index = RecordIndex(self.folder, lambda: ())
        for version in versions:
            record = known.journal[version.key] if version.key in known.journal else None
            if record is None or not there.holds(record):
                found = [record for record, _ in index.places(version.key) if there.holds(record)]
                found.sort(key=self._complete)
                record = found[-1] if found else None
                if record is not None:
                    known.journal.write(record)
            if record is None:
                known.missing.append(version)
            elif not self._complete(record):
                known.unwritten.append(version)
            else:
                known.finished.add(version.key)

    def _complete(self, record: dict[str, Any]) -> bool:
        """Whether a record with features has what the recognizer writes of them, if there is one."""
        return self.encoder.writing_key in (None, record.get("written", {}).get("by"))

    def _encode(self, read: list["Read"], writer: RawChunkyWriter, known: Known) -> None:
        def gave_up(one: Read, reason: str) -> None:
            known.leave_out(one.version, reason)

        for one in in_parts(partial(_encode, self.encoder), read, gave_up):
            array = writer.store_array(one.version.cut.id, one.features)
            writer.flush()
            record = {"key": one.version.key, "array": array.to_dict()}
            if len(one.places.rows) > 1 or one.version.cut.duration > WINDOW_SECONDS:
                record["windows"] = one.places.field()
            if one.written is not None:
                record["written"] = {"by": self.encoder.writing_key, "tokens": one.written}
            known.note(record)
            known.encoded += 1

    def _write(self, versions: list[Version], known: Known) -> None:
        """What the recognizer writes of features that are there; no audio is read."""
        records = [known.journal[version.key] for version in versions]
        for record, tokens in in_parts(partial(_written, self.encoder), records, lambda *_: None):
            known.note(record | {"written": {"by": self.encoder.writing_key, "tokens": tokens}})
        known.finished |= {version.key for version in versions}  # one too long to be written of keeps its features


def in_parts(
    work: Callable[[list[Item]], Iterable[Result]], items: list[Item], gave_up: Callable[[Item, str], Any]
) -> Iterator[Result]:
    """What ``work`` gives for a batch; of halves of it where the memory does not suffice.

    Args:
        gave_up: called with an item for which even alone it does not, and the reason.
    """
    if not items:
        return
    done, problem = None, ""
    try:
        done = list(work(items))
    except torch.OutOfMemoryError as error:
        problem = f"OutOfMemoryError: {str(error)[:200]}"  # and not the error, which holds what the batch takes
    if done is not None:
        yield from done
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(items) == 1:
        gave_up(items[0], problem)
        return
    for half in (items[: len(items) // 2], items[len(items) // 2 :]):
        yield from in_parts(work, half, gave_up)


class Arrays:
    """Whether the arrays that records point to are there; a file may have been deleted, or not copied."""

    def __init__(self) -> None:
        self.sizes = FileSizes()

    def holds(self, record: dict[str, Any]) -> bool:
        return end_of(record["array"]["storage_key"]) <= self.sizes[record["array"]["storage_path"]]

    def whole(self, path: Path, journal: jsonl.Journal) -> Path:
        """The file to append to: ``path``, unless it, or a file that follows it, has lost what the journal says it
        holds, so that old records would point into new arrays; then another one."""
        records = (journal[key] for key in journal.places)
        if all(self.holds(r) for r in records if Path(r["array"]["storage_path"]).name.startswith(f"{path.stem}.")):
            return path
        return path.with_suffix(f".{uuid.uuid4().hex[:8]}{path.suffix}")


def _versions(cut: Cut, speeds: Sequence[float], encoder_key: str) -> list[Version]:
    own = [perturbed(cut, factor) for factor in speeds] if cut.has_recording else [cut]
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
    line["custom"] = custom | {KEY_FIELD: versions[0].key, AUDIO_FIELD: audio_identity(cut), SPAN_FIELD: span_of(cut)}
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


def _readable(versions: list[Version], sampling_rate: int, known: Known) -> list[Read]:
    """Those whose audio can be read: one broken recording must not stop the run."""
    found = []
    for version in versions:
        if not version.cut.has_recording:
            known.leave_out(version, "has no recording")
            continue
        try:
            found.append(Read(version, mono_samples(version.cut, sampling_rate)))
        except Exception as error:  # decoders raise their own types
            raise_if_of_the_machine(error, sources_of(version.cut))
            known.leave_out(version, f"{type(error).__name__}: {str(error)[:200]}")
    return found


@dataclass(frozen=True)
class Encoded:
    """What is kept of a version of a cut: features (T, D), where their windows begin, and what the recognizer writes of
    each window.
    """

    version: Version
    features: Tensor
    places: WindowPlaces
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
        places = WindowPlaces(begins, begins if windows is None else [windows.begins[row] for row in own])
        texts = None if written is None else [written[row] for row in own]
        yield Encoded(one.version, torch.cat([rows[row] for row in own]), places, texts)


def _written(encoder: FrozenEncoder, records: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[list[int]]]]:
    """Records, each with what the recognizer writes of the windows of its features."""
    parts = [
        features_of(Array.from_dict(record["array"]).load()).tensor_split(
            WindowPlaces.of(record.get("windows")).rows[1:]
        )
        for record in records
    ]
    rows = [row for own in parts for row in own]
    lengths = torch.tensor([len(row) for row in rows])
    features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    written = iter(encoder.write(features.to(encoder.device), lengths.to(encoder.device)) or [])
    for record, own in zip(records, parts, strict=True):
        yield record, [next(written) for _ in own]
