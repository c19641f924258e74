"""A Lhotse array storage that keeps bytes as they are (bfloat16 included) in append-only files of bounded size.

Lhotse's own ``lilcom_chunky`` is lossy and HDF5 is left unreadable by a crash. Here a killed run leaves at most
unreferenced bytes at the end of the file: a manifest line is written only after its array is on disk.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.features.io import FeaturesReader, FeaturesWriter, register_reader, register_writer

STORAGE_TYPE = "raw_chunky"


@register_writer
class RawChunkyWriter(FeaturesWriter):
    """Appends arrays to ``storage_path``; the key of an array is ``offset,dtype,shape`` (``12,bfloat16,40x384``).

    Args:
        storage_path: ``NAME.bin``; further files are ``NAME.00001.bin`` and so on.
        max_bytes: a file of this size is followed by the next one; None: all in one.
        named: what manifests call the file, if it gets another name when it is complete.
    """

    name = STORAGE_TYPE

    def __init__(
        self,
        storage_path: str | Path,
        mode: str = "ab",
        max_bytes: int | None = None,
        named: str | Path | None = None,
        **_: Any,
    ) -> None:
        self.named = named
        self.first, self.mode, self.max_bytes, self.number = Path(storage_path), mode, max_bytes, 0
        self.first.parent.mkdir(parents=True, exist_ok=True)
        while self._path(self.number + 1).exists():
            self.number += 1
        self.file = open(self._path(self.number), mode)

    def _path(self, number: int) -> Path:
        return self.first.with_suffix(f".{number:05d}{self.first.suffix}") if number else self.first

    @property
    def storage_path(self) -> str:
        """Of the array that was written last."""
        return str(self.named or self._path(self.number))

    def write(self, key: str, value: np.ndarray | torch.Tensor) -> str:
        tensor = torch.as_tensor(value).contiguous()
        offset = self.file.seek(0, os.SEEK_END)
        if self.max_bytes is not None and offset >= self.max_bytes:
            self.file.close()
            self.number, offset = self.number + 1, 0
            self.file = open(self._path(self.number), self.mode)
        self.file.write(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        return f"{offset},{str(tensor.dtype).removeprefix('torch.')},{'x'.join(map(str, tensor.shape))}"

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "RawChunkyWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def place_of(key: str) -> tuple[int, np.dtype, list[int]]:
    """What an array's key says: the byte at which it begins, its type (bfloat16 as int16), its shape."""
    offset, dtype, shape = key.split(",")
    return int(offset), np.dtype(np.int16 if dtype == "bfloat16" else dtype), [int(s) for s in shape.split("x")]


def end_of(key: str) -> int:
    """The byte after an array's last one."""
    begin, dtype, sizes = place_of(key)
    return begin + dtype.itemsize * int(np.prod(sizes))


class FileSizes(dict[str, int]):
    """Bytes of files by path, asked once; -1 where there is none. A file may have lost what was written last."""

    def __missing__(self, path: str) -> int:
        self[path] = Path(path).stat().st_size if Path(path).is_file() else -1
        return self[path]


@register_reader
class RawChunkyReader(FeaturesReader):
    """Reads what :class:`RawChunkyWriter` wrote; bfloat16 comes back as int16 bits (NumPy has no bfloat16)."""

    name = STORAGE_TYPE

    def __init__(self, storage_path: str | Path, *_: Any, **__: Any) -> None:
        self.storage_path = str(storage_path)

    def read(self, key: str, left_offset_frames: int = 0, right_offset_frames: int | None = None) -> np.ndarray:
        offset, dtype, sizes = place_of(key)
        array = np.fromfile(self.storage_path, dtype, int(np.prod(sizes)), offset=offset)
        if array.size != np.prod(sizes):
            raise OSError(f"{self.storage_path} ends before the array at {key}: the file was truncated.")
        return array.reshape(sizes)[left_offset_frames:right_offset_frames]
