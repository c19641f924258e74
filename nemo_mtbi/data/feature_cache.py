"""Encoder features stored once with the cuts (``cut.encoder_features``), so that training never runs the encoder, and
beside them what a frozen recognizer writes of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut, MonoCut, MultiCut
from lhotse.cut.data import DataCut

from nemo_mtbi.data.audio_windows import WINDOW_SECONDS
from nemo_mtbi.errors import DataError
from nemo_mtbi.io import array_storage as array_storage  # registers the storage with Lhotse

FEATURES_FIELD = "encoder_features"
KEY_FIELD = "encoder_features_key"
AUDIO_FIELD = "encoder_features_audio"
SPAN_FIELD = "encoder_features_of"
PLACES, PLACE_BYTES = 64, 16384  # of an audio file that are compared: of one up to 1 MiB, all
SAMPLES_KEPT = 65536  # of files, in a process
SPAN_SECONDS = 0.02  # to which a span is the same: resampling rounds to samples
WINDOWS, WRITTEN = "_windows", "_written"  # fields beside a field of features


def windows_field(field: str) -> str:
    """Field with the places at which the windows of the features in ``field`` begin (:class:`WindowPlaces`); absent of
    cuts up to 30 s.
    """
    return f"{field}{WINDOWS}"


def written_field(field: str) -> str:
    """Field with what a recognizer writes of the features in ``field``.

    ``by``, its key (``Connector.writing_key``), and ``tokens``, a list for each window.
    """
    return f"{field}{WRITTEN}"


def features_key(cut: Cut, encoder_key: str) -> str:
    """Identity of a cut's features.

    The encoder (weights, input length) and the audio (file, its size and time, span).
    """
    digest = hashlib.blake2b(encoder_key.encode(), digest_size=12)
    digest.update(f"{cut.start}/{cut.duration}/{getattr(cut, 'sampling_rate', None)}".encode())
    if cut.duration > WINDOW_SECONDS:  # once windows were equal
        digest.update(b"quiet cuts")
    if cut.has_recording and (
        cut.num_channels != 1 or cut.sampling_rate != 16_000
    ):  # once channels were averaged always, and Lhotse resampled
        digest.update(b"mono, soxr")
    if isinstance(cut, MonoCut) and cut.has_recording and len(cut.recording.channel_ids) > 1:  # one of several
        digest.update(f"channel {cut.channel}".encode())
    if isinstance(cut, MultiCut) and cut.has_recording and list(cut.channel) != list(cut.recording.channel_ids):
        digest.update(f"channels {cut.channel}".encode())
    if getattr(cut, "has_recording", False) and cut.recording.transforms:  # speed, volume, ...
        digest.update(f"resampled once {cut.recording.transforms}".encode())
    for source in cut.recording.sources if hasattr(cut, "recording") and cut.recording else []:
        digest.update(str(source.source if source.type in ("file", "url") else cut.recording_id).encode())
        if source.type == "file" and Path(source.source).exists():
            stat = Path(source.source).stat()
            digest.update(f"{stat.st_size}/{stat.st_mtime_ns}".encode())
    return f"{encoder_key}-{digest.hexdigest()}"


def audio_identity(cut: Cut) -> str | None:
    """Size, time of change and a digest of the content of the cut's audio files; None if one is not a file on
    this machine.

    A cut that is resampled on the way keeps it, other than :func:`features_key`.
    """
    try:
        files = [(file, file.stat()) for file in _audio_files(cut)]
        known = [f"{s.st_size}/{s.st_mtime_ns}/{_sample(f, s.st_size, s.st_mtime_ns)}" for f, s in files]
    except OSError:
        return None
    return ",".join(known) or None


def is_same_audio(cut: Cut, noted: str) -> bool:
    """Whether the cut's audio files are those of an :func:`audio_identity`, or copies of them, which have other times.

    Files of which only the time is noted (before December 2026) have to have that; what is not on this machine cannot
    be told apart.
    """
    before = [one.split("/") for one in noted.split(",")]
    try:
        files = _audio_files(cut)
        same = len(before) == len(files) and all(_is_same(f, *one) for f, one in zip(files, before, strict=True))
    except OSError:
        return True
    return same or not files


def _is_same(file: Path, size: str, time: str, content: str | None = None) -> bool:
    stat = file.stat()
    if str(stat.st_size) != size:
        return False
    same_time = str(stat.st_mtime_ns) == time
    return same_time or (content is not None and _sample(file, stat.st_size, stat.st_mtime_ns) == content)


def _audio_files(cut: Cut) -> list[Path]:
    """Of the cut; none if some of its audio is no file.

    Raises:
        OSError: one is not on this machine.
    """
    sources = cut.recording.sources if getattr(cut, "has_recording", False) else []
    return [Path(source.source) for source in sources] if all(source.type == "file" for source in sources) else []


@lru_cache(SAMPLES_KEPT)
def _sample(file: Path, size: int, time: int) -> str:
    """Digest of a file of ``size`` bytes, changed at ``time``; of a long one, of places all over it."""
    digest = hashlib.blake2b(digest_size=8)
    with file.open("rb") as content:
        if size <= PLACES * PLACE_BYTES:
            digest.update(content.read())
        else:
            for number in range(PLACES):
                content.seek(number * (size - PLACE_BYTES) // (PLACES - 1))
                digest.update(content.read(PLACE_BYTES))
    return digest.hexdigest()


def span_of(cut: DataCut) -> list[Any]:
    """Begin and duration in seconds of what a cut's features are of, and what is done to its audio but resampling."""
    transforms = cut.recording.transforms or [] if cut.has_recording else []
    done = [t if isinstance(t, dict) else t.to_dict() for t in transforms]
    return [cut.start, cut.duration, [t for t in done if t.get("name") != "Resample"]]


def same_span(one: list[Any], other: list[Any]) -> bool:
    times = all(abs(a - b) <= SPAN_SECONDS for a, b in zip(one[:2], other[:2], strict=True))
    return times and one[2] == other[2]


def with_span(cut: DataCut, before: DataCut, audio_as_it_is: bool = False) -> DataCut:
    """A cut that hears what ``before`` did, in another place or at a speed that has features of its own.

    ``audio_as_it_is``: what is heard of the audio, and what was done to it, is a recording of its own (Shar).
    """
    noted = (before.custom or {}).get(SPAN_FIELD)
    if noted is not None and same_span(noted, span_of(before)):
        span = span_of(cut)
        cut.custom = {**(cut.custom or {}), SPAN_FIELD: [0.0, span[1], []] if audio_as_it_is else span}
    return cut


def is_features(field: str) -> bool:
    """Whether a custom field of cuts holds cached features, at some speed."""
    own = field == FEATURES_FIELD or field.startswith(f"{FEATURES_FIELD}_sp")
    return own and not field.endswith((WINDOWS, WRITTEN))


def describes_features(field: str) -> bool:
    """Whether a custom field of cuts belongs to cached features, at some speed: they, their windows, what is written of
    them.
    """
    return is_features(field.removesuffix(WINDOWS).removesuffix(WRITTEN))


def written_of(cut: Cut, key: str) -> list[list[int]] | None:
    """Tokens that the recognizer ``key`` writes of each window of the cut's features; None: they were not kept, or are
    another recognizer's.
    """
    found = (cut.custom or {}).get(written_field(FEATURES_FIELD)) or {}
    return found["tokens"] if found.get("by") == key else None


@dataclass(frozen=True)
class WindowPlaces:
    """Where the windows of an audio begin.

    Attributes:
        rows: of the cached features (T, D).
        frames: of the audio. An encoder with causal convolutions gives a frame more than it has time for, of each
            window.
    """

    rows: list[int]
    frames: list[int]

    @classmethod
    def of(cls, field: Sequence[int | Sequence[int]] | None) -> "WindowPlaces":
        """From a field: one number for each window, or two where row and frame differ; None: one window."""
        pairs = [(own, own) if isinstance(own, int) else (own[0], own[1]) for own in field or [0]]
        return cls([row for row, _ in pairs], [frame for _, frame in pairs])

    def field(self) -> list[int | list[int]]:
        return [row if row == frame else [row, frame] for row, frame in zip(self.rows, self.frames, strict=True)]


def windows_of(cut: Cut) -> WindowPlaces:
    """Where the windows of the cut's cached features begin.

    Raises:
        DataError: the features of a long cut are older than this record.
    """
    begins = (cut.custom or {}).get(windows_field(FEATURES_FIELD))
    if begins is None and cut.duration > WINDOW_SECONDS:
        raise DataError(
            f"The cached features of {cut.id} ({cut.duration:.1f} s) were made before long audio was cut at pauses. "
            "Run cache_features.py again."
        )
    return WindowPlaces.of(begins)


def load_array(cut: Cut, field: str, encoder_key: str | None) -> torch.Tensor:
    """Cached features (T, D), bfloat16.

    Raises:
        DataError: the cut has none, they come from another encoder, other audio or another part of it, or their file
            is gone.
    """
    if not isinstance(cut, DataCut):
        raise DataError(
            f"{cut.id} is a {type(cut).__name__}, and features were cached of its parts alone. Save mixed cuts as "
            "recordings (CutSet.save_audios) and run cache_features.py, or set data.cached_features=false."
        )
    custom: dict[str, Any] = cut.custom or {}
    if field not in custom:
        raise DataError(
            f"Cut {cut.id} has no cached encoder features at this speed. Run cache_features.py on the manifest (with "
            "the perturb_speed of training), or set data.cached_features=false."
        )
    if encoder_key is not None and not str(custom.get(KEY_FIELD, "")).startswith(f"{encoder_key}-"):
        raise DataError(
            f"The cached features of {cut.id} come from another encoder or input length "
            f"({custom.get(KEY_FIELD)}, now {encoder_key}). Run cache_features.py again."
        )
    heard = custom.get(AUDIO_FIELD)
    if heard is not None and not is_same_audio(cut, heard):
        raise DataError(
            f"The audio of {cut.id} has changed since its features were cached ({heard}, now {audio_identity(cut)}: "
            "bytes, time of change, content). Run cache_features.py again."
        )
    span, of = custom.get(SPAN_FIELD), span_of(cut)
    in_memory = getattr(custom[field], "is_in_memory", False)  # read with the cut, from a Shar that Lhotse wrote
    if span is not None and not in_memory and not same_span(span, of):
        raise DataError(
            f"The cached features of {cut.id} are of {span}, the cut is now {of} (begin and duration in seconds, what "
            "is done to the audio). Run cache_features.py on the cuts as they are trained on."
        )
    try:
        array = np.array(cut.load_custom(field))
    except FileNotFoundError as error:
        raise DataError(
            f"The cached features of {cut.id} are gone: there is no {error.filename}. A relative path begins in the "
            "folder in which cache_features.py ran; start there, or run it again."
        ) from None
    return features_of(array)


def features_of(array: np.ndarray) -> torch.Tensor:
    """Features (T, D) as they are kept: bfloat16 comes as its bits, since NumPy has none."""
    return torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.int16 else torch.from_numpy(array)
