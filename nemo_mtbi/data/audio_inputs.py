"""What a user names as audio (files, folders, NeMo manifests, lists of them) as recordings, or parts of them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_mtbi.data.audio import audio_files
from nemo_mtbi.data.audio_stream import AudioBlocks, open_audio
from nemo_mtbi.data.manifest import read_manifest
from nemo_mtbi.errors import DataError

MANIFEST_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class AudioInput:
    """One recording to listen to.

    Attributes:
        path: of the audio file; of the manifest, with a problem.
        offset_seconds, duration_seconds: the part that is heard; None: to the end.
        problem: why there is nothing to hear: no such file, or a manifest's line that names none; or None.
    """

    path: Path
    offset_seconds: float = 0.0
    duration_seconds: float | None = None
    problem: str | None = None

    def __str__(self) -> str:
        if not self.offset_seconds and self.duration_seconds is None:
            return str(self.path)
        end = "end" if self.duration_seconds is None else f"{self.offset_seconds + self.duration_seconds:g} s"
        return f"{self.path} ({self.offset_seconds:g} s to {end})"

    def open(self, sampling_rate: int) -> AudioBlocks:
        """The recording in blocks, see :func:`nemo_mtbi.data.audio_stream.open_audio`.

        Raises:
            DataError: a broken line, or audio that cannot be read.
        """
        if self.problem is not None:
            raise DataError(self.problem)
        return open_audio(self.path, sampling_rate, self.offset_seconds, self.duration_seconds)

    def to_dict(self) -> dict[str, Any]:
        """As a NeMo manifest names it, with ``audio`` for the path."""
        part = {"offset": self.offset_seconds or None, "duration": self.duration_seconds}
        return {"audio": str(self.path), **{k: v for k, v in part.items() if v is not None}}


def audio_inputs(audio: str | Path | Sequence[str | Path], encoding: str | None = None) -> Iterator[AudioInput]:
    """Recordings of files, folders and NeMo manifests, in their order.

    Args:
        audio: path or paths.
        encoding: of the manifests, see :func:`nemo_mtbi.io.text.read_text`.

    Raises:
        DataError: a folder without audio, an empty manifest.
    """
    for item in [audio] if isinstance(audio, str | Path) else audio:
        path = Path(item)
        if os.path.isdir(path):  # not Path.is_dir, which raises for a name that is too long
            yield from map(AudioInput, audio_files(path))
        elif not os.path.exists(path):
            yield AudioInput(path, problem=f"There is no audio file {path}.")
        elif path.name.lower().endswith(MANIFEST_SUFFIXES):
            for line in read_manifest(path, encoding=encoding):
                if line.audio is None:
                    yield AudioInput(path, problem=f"{line.where}: {line.problem}")
                else:
                    yield AudioInput(line.audio, line.offset_seconds, line.duration_seconds)
        else:
            yield AudioInput(path)
