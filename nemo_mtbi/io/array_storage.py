"""A Lhotse array storage that keeps bytes as they are (bfloat16 included) in one append-only file.

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
    """Appends arrays to ``storage_path``; the key of an array is ``offset,dtype,shape`` (``12,bfloat16,40x384``)."""

    name = STORAGE_TYPE

    def __init__(self, storage_path: str | Path, mode: str = "ab", **_: Any) -> None:
        path = Path(storage_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.storage_path_ = str(path)
        self.file = open(path, mode)

    @property
    def storage_path(self) -> str:
        return self.storage_path_

    def write(self, key: str, value: np.ndarray | torch.Tensor) -> str:
        tensor = torch.as_tensor(value).contiguous()
        offset = self.file.seek(0, os.SEEK_END)
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


@register_reader
class RawChunkyReader(FeaturesReader):
    """Reads what :class:`RawChunkyWriter` wrote; bfloat16 comes back as int16 bits (NumPy has no bfloat16)."""

    name = STORAGE_TYPE

    def __init__(self, storage_path: str | Path, *_: Any, **__: Any) -> None:
        self.storage_path = str(storage_path)

    def read(self, key: str, left_offset_frames: int = 0, right_offset_frames: int | None = None) -> np.ndarray:
        offset, dtype, shape = key.split(",")
        sizes = [int(s) for s in shape.split("x")]
        numpy_dtype = np.dtype(np.int16 if dtype == "bfloat16" else dtype)
        array = np.fromfile(self.storage_path, numpy_dtype, int(np.prod(sizes)), offset=int(offset))
        if array.size != np.prod(sizes):
            raise OSError(f"{self.storage_path} ends before the array at {key}: the file was truncated.")
        return array.reshape(sizes)[left_offset_frames:right_offset_frames]
