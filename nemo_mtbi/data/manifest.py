"""NeMo manifests as they are found: one utterance after the other, and what is wrong with the lines that hold none."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_mtbi.errors import DataError
from nemo_mtbi.io.text import numbered_lines, read_text

SPEAKER_FIELDS = ("speaker", "speaker_id")
LANGUAGE_FIELDS = ("lang", "language", "source_lang")


@dataclass(frozen=True)
class ManifestLine:
    """One line of a manifest.

    Attributes:
        number: of the line, from 1 (of the element, where the file is one JSON array).
        where: file and line, for messages.
        audio: path; None with a problem.
        text: transcript; None if there is none, or null.
        offset_seconds, duration_seconds: part of the file; None: to its end.
        speaker, language: None if not given.
        problem: why the line cannot be used, or None.
        fields: all of the line, as it stands there.
    """

    number: int
    where: str
    audio: Path | None = None
    text: str | None = None
    offset_seconds: float = 0.0
    duration_seconds: float | None = None
    speaker: str | None = None
    language: str | None = None
    problem: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def read_manifest(
    path: Path, audio_root: str | Path | None = None, encoding: str | None = None
) -> Iterator[ManifestLine]:
    """Lines of a NeMo manifest (JSON objects line by line, or one JSON array), broken ones with their problem.

    Args:
        path: of the manifest.
        audio_root: folder that relative audio paths start from; None: the manifest's.
        encoding: see :func:`nemo_mtbi.io.text.read_text`.

    Raises:
        DataError: no line at all; bytes that cannot be decoded.
    """
    root, count = Path(audio_root or path.parent), 0
    for count, (number, where, row) in enumerate(_rows(path, encoding), 1):  # noqa: B007
        try:
            yield _line(number, where, row, root)
        except DataError as error:
            yield ManifestLine(number, where, problem=str(error))
    if not count:
        raise DataError(f"The manifest {path} is empty.")


def _rows(path: Path, encoding: str | None) -> Iterator[tuple[int, str, Any]]:
    """Number, place, and what stands there: a parsed value, or the error that it gave."""
    _, first = next(numbered_lines(path, encoding), (0, ""))
    if first.lstrip().startswith("["):
        try:
            for number, row in enumerate(json.loads(read_text(path, encoding)), 1):
                yield number, f"{path}, element {number}", row
            return
        except ValueError:
            pass  # lines, of which the first is an array
    for number, line in numbered_lines(path, encoding):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = error
        yield number, f"{path}, line {number}", row


def _line(number: int, where: str, row: Any, root: Path) -> ManifestLine:
    if isinstance(row, Exception):
        raise DataError(f"no JSON ({row})")
    if not isinstance(row, dict):
        raise DataError(f"a JSON {type(row).__name__}, not an object with audio_filepath")
    audio = cell(row, "audio_filepath")
    if not audio:
        raise DataError(f"audio_filepath is {'missing' if 'audio_filepath' not in row else json.dumps(audio)}")
    offset, duration = _seconds(row, "offset") or 0.0, _seconds(row, "duration")
    if duration == 0:
        raise DataError("duration is 0")
    return ManifestLine(
        number,
        where,
        _audio_path(audio, root),
        cell(row, "text"),
        offset,
        duration,
        next(filter(None, (cell(row, f) for f in SPEAKER_FIELDS)), None),
        next(filter(None, (cell(row, f) for f in LANGUAGE_FIELDS)), None),
        fields=row,
    )


def _audio_path(audio: str, root: Path) -> Path:
    """NeMo's rule: a relative path starts at the manifest; if there is nothing, at the working directory."""
    if "://" in audio:
        raise DataError(f"audio_filepath {audio} is no file; recordings in object storage come in a Lhotse manifest")
    try:
        path = Path(audio).expanduser()
        return path if path.is_absolute() or (not (root / path).exists() and path.exists()) else root / path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such user
        raise DataError(f"audio_filepath is no path ({error})") from error


def cell(row: dict[str, Any], field: str) -> str | None:
    """A string; numbers are written as people write them, so that speaker 7 is speaker "7"."""
    value = row.get(field)
    if isinstance(value, float) and not math.isfinite(value):  # an empty cell of pandas
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        word = str(value).strip()
        if not word.isascii() and word != word.encode(errors="replace").decode():
            raise DataError(f"{field} holds half a character, which cannot be written ({json.dumps(word)[:80]})")
        return word
    if value is not None:
        raise DataError(f"{field} is {json.dumps(value)[:80]}, not a string")
    return None


def _seconds(row: dict[str, Any], field: str) -> float | None:
    value = row.get(field)
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise DataError(f"{field} is {json.dumps(value)[:80]}, not a number of seconds")
    return seconds
