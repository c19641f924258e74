"""Cuts of a manifest by line, so that a rank reads the lines that it trains on and no others.

Letters: N lines.
"""

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from nemo.collections.common.data.lhotse.cutset import resolve_relative_paths

from nemo_mtbi.errors import DataError
from nemo_mtbi.io import jsonl

BLOCK_BYTES = 2**24


class Share:
    """A rank's part of a CutSet, which every rank would otherwise read, parse and tokenize as a whole.

    Lines of an uncompressed manifest on a disk are read where they stand, in an order that is drawn anew for every
    visit and is the same for all ranks; other CutSets are read through, and the cuts of other ranks left out.

    Args:
        cuts: of a whole visit.
        path: of their manifest, if they are all of one.
        rank, world_size: of the data-parallel ranks.
        seed: of the order; None: as they stand.
        dealt: lines that go to a rank together. With those of a batch, the batches of n ranks are those of one rank
            in n micro-batches.
    """

    def __init__(
        self,
        cuts: CutSet,
        path: Any = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        dealt: int = 1,
    ) -> None:
        self.cuts, self.rank, self.world_size, self.seed, self.dealt = cuts, rank, world_size, seed, dealt
        alone = world_size == 1 and seed is None
        self.path = Path(path) if has_lines(path) and not alone else None

    def visit(self, number: int) -> Iterator[Cut]:
        """The cuts of one pass."""
        if self.path is None:
            return islice(iter(self.cuts), self.rank, None, self.world_size)
        return self._lines(self.path, number)

    def _lines(self, path: Path, visit: int) -> Iterator[Cut]:
        starts = line_starts(path)
        order = np.arange(len(starts) - 1)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, visit]).permutation(order)
        resolved = partial(resolve_relative_paths, manifest_path=str(path))
        with open(path, "rb") as file:
            for line in self._own(order).tolist():
                file.seek(starts[line])
                text = file.read(int(starts[line + 1] - starts[line]))
                if text.strip():
                    yield resolved(deserialize_item(jsonl.parsed(path, line + 1, text)))

    def _own(self, order: np.ndarray) -> np.ndarray:
        """Of fewer lines than ranks every rank reads all, each from another one on."""
        if len(order) < self.world_size:
            return np.roll(order, -self.rank)
        dealt = self.dealt if len(order) >= self.dealt * self.world_size else 1
        return order[np.arange(len(order)) // dealt % self.world_size == self.rank]


def has_lines(path: Any) -> bool:
    """Whether a manifest's lines can be read where they stand."""
    return isinstance(path, str) and path.endswith(".jsonl") and Path(path).is_file()


def line_starts(path: Path) -> np.ndarray:
    """Byte offsets (N + 1,) of the lines of a file, its size at the end; kept beside it where that can be written.

    Raises:
        DataError: no line at all.
    """
    kept = path.with_name(f".{path.name}.lines.npy")
    size, changed = path.stat().st_size, path.stat().st_mtime_ns
    try:
        if kept.stat().st_mtime_ns >= changed and (starts := np.load(kept, mmap_mode="r"))[-1] == size:
            return starts
    except (OSError, ValueError, EOFError, IndexError):  # absent, or not whole
        pass
    starts = _found(path, size)
    temporary = kept.with_name(f"{kept.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, starts)
        temporary.replace(kept)
    except OSError:  # a folder that can only be read
        temporary.unlink(missing_ok=True)
    return starts


def _found(path: Path, size: int) -> np.ndarray:
    ends, begin = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (begin + 1))
            begin += len(block)
    starts = np.concatenate(ends)
    if starts[-1] != size:
        starts = np.append(starts, size)
    if len(starts) < 2:
        raise DataError(f"The manifest {path} is empty. Did the step that writes it finish?")
    return starts
