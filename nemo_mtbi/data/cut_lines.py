"""Cuts of a manifest by line, so that a rank reads the lines that it trains on and no others.

Letters: N lines.
"""

import os
import tarfile
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from filelock import FileLock
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.serialization import decode_json_line, deserialize_item
from nemo.collections.common.data.lhotse.cutset import resolve_relative_paths
from torch.utils.data import get_worker_info

from nemo_mtbi.errors import DataError
from nemo_mtbi.io import jsonl

T = TypeVar("T")
BLOCK_BYTES = 2**24
LOCK_SECONDS = 600.0  # after which a lock is another, dead, host's; Timeout is an OSError


def readable(cuts: Iterable[T], source: str = "The data") -> Iterator[T]:
    """The cuts, or what else is read of a source, whose name is for the message.

    Raises:
        DataError: it cannot be read (any further).
    """
    stream = iter(cuts)
    while True:
        try:
            item = next(stream)
        except StopIteration:
            return
        except DataError:
            raise
        # AssertionError: the parts of a Shar are not of one version.
        except (OSError, EOFError, ValueError, AssertionError, zlib.error, tarfile.TarError) as error:
            first: BaseException = error
            while first.__cause__ or first.__context__:
                first = first.__cause__ or first.__context__ or first
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{source} cannot be read any further: {said} ({type(first).__name__}: {first})."
            ) from error
        yield item


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
        shars: readers in the cuts, whose ``visit`` is set.
        by_worker: a rank's loader workers draw, each from a part of its own.
        whole: each process that draws is given the whole source (Shar), in an order of its own.
    """

    def __init__(
        self,
        cuts: CutSet,
        path: Any = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        dealt: int = 1,
        shars: Sequence[Any] = (),
        by_worker: bool = False,
        whole: bool = False,
    ) -> None:
        self.shars, self.by_worker, self.whole = shars, by_worker, whole
        self.shar = shars[0] if whole and len(shars) == 1 and shars[0].source.slice_length is None else None
        self.cuts, self.ranks, self.seed, self.dealt = cuts, (rank, world_size), seed, dealt
        self.path = Path(path) if has_lines(path) else None
        self.starts: np.ndarray | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Of this process among those that draw, and their number."""
        rank, count = self.ranks
        worker = get_worker_info() if self.by_worker else None
        return (rank, count) if worker is None else (rank * worker.num_workers + worker.id, count * worker.num_workers)

    def drawn_visit(self, number: int) -> int:
        """What tasks, wordings, speeds and spans of a pass are drawn by: processes that all read the whole source are
        to draw different ones, since together they make many passes while each makes one."""
        place, count = self.place
        return number * count + place if self.whole else number

    def visit(self, number: int) -> Iterator[Cut]:
        """The cuts of one pass. Without an order of its own a pass gives every rank the next one's share."""
        return (cut for _, _, cut in self.placed(number))

    def placed(self, number: int, begin: int = 0) -> Iterator[tuple[int, int, Cut]]:
        """The cuts of one pass from its ``begin``-th on, each with its number in the pass and its line (from 0); of a
        Shar that is read whole, the places are :class:`nemo_mtbi.data.shar.SharVisits`'."""
        for shar in self.shars:
            shar.visit = number
        if self.shar is not None:
            yield from self.shar.placed(begin)
            return
        if self.path is None:
            rank, count = (0, 1) if self.whole else self.place
            cuts = islice(readable(self.cuts), (rank + number) % count, None, count)
            for at, cut in enumerate(islice(cuts, begin, None), begin):
                yield at, at, cut
            return
        with self._opened(self.path) as file:
            assert self.starts is not None
            order = np.arange(len(self.starts) - 3)
            if self.seed is not None:
                order = np.random.default_rng([self.seed, number]).permutation(order)
            for at, line in enumerate(self._own(order, number)[begin:].tolist(), begin):
                if (cut := self._cut(file, line)) is not None:
                    yield at, line, cut

    def at(self, lines: Iterable[int]) -> Iterator[Cut]:
        """The cuts of some lines of the manifest, or places in the Shar.

        Raises:
            DataError: it no longer has them.
        """
        if self.shar is not None:
            yield from self.shar.at(lines)
            return
        assert self.path is not None
        with self._opened(self.path) as file:
            assert self.starts is not None
            for line in lines:
                cut = self._cut(file, line) if line < len(self.starts) - 3 else None
                if cut is None:
                    raise DataError(
                        f"{self.path} has no cut in line {line + 1}, which is still to be trained on. Did the manifest "
                        "change since the run was stopped?"
                    )
                yield cut

    @contextmanager
    def _opened(self, path: Path) -> Iterator[BinaryIO]:
        with open(path, "rb") as file:
            if self.starts is None or not _fits(self.starts, file):
                self.starts = line_starts(path, file)
            yield file

    def _cut(self, file: BinaryIO, line: int) -> Cut | None:
        """None for a blank line."""
        assert self.path is not None and self.starts is not None
        begin, end = map(int, self.starts[line + 2 : line + 4])
        file.seek(begin)
        if not (text := file.read(end - begin)).strip():
            return None
        try:
            read = decode_json_line(text)  # as Lhotse reads manifests
        except ValueError:
            read = jsonl.parsed(self.path, line + 1, text)
        cut = deserialize_item(read)
        return resolve_relative_paths(cut, manifest_path=str(self.path))

    def _own(self, order: np.ndarray, visit: int) -> np.ndarray:
        """Of fewer lines than ranks every rank reads all, each from another one on."""
        rank, count = self.place
        rank = rank if self.seed is not None else (rank + visit) % count
        if len(order) < count:
            return np.roll(order, -rank)
        dealt = self.dealt if len(order) >= self.dealt * count else 1
        return order[np.arange(len(order)) // dealt % count == rank]


def has_lines(path: Any) -> bool:
    """Whether a manifest's lines can be read where they stand."""
    return isinstance(path, str) and path.endswith(".jsonl") and Path(path).is_file()


def count_lines(path: Any) -> int | None:
    """Lines of a manifest whose lines can be read where they stand; None of others."""
    if not has_lines(path):
        return None
    with open(path, "rb") as file:
        return len(line_starts(Path(path), file)) - 3


def line_starts(path: Path, file: BinaryIO) -> np.ndarray:
    """Size and time of change of an open file, then the byte offsets of its N lines and its end (N + 3,).

    They are kept beside the file, where that can be written.

    Raises:
        DataError: no line at all.
    """
    kept = path.with_name(f".{path.name}.lines.npy")
    if (starts := _kept(kept, file)) is not None:
        return starts
    try:
        with FileLock(kept.with_suffix(".lock"), timeout=LOCK_SECONDS):  # one process of a job looks for them
            if (starts := _kept(kept, file)) is not None:
                return starts
            starts = np.concatenate([_identity(file), _found(path, file)])
            temporary = kept.with_name(f"{kept.name}.{uuid.uuid4().hex}")
            try:
                with open(temporary, "wb") as out:
                    np.save(out, starts)
                temporary.replace(kept)
            finally:
                temporary.unlink(missing_ok=True)
            return starts
    except (OSError, NotImplementedError):  # a folder, or a file system, that can only be read, or has no locks
        return np.concatenate([_identity(file), _found(path, file)])


def _kept(kept: Path, file: BinaryIO) -> np.ndarray | None:
    try:
        starts = np.load(kept)
    except (OSError, ValueError, EOFError):  # absent, or not whole
        return None
    return starts if _fits(starts, file) else None


def _identity(file: BinaryIO) -> np.ndarray:
    status = os.fstat(file.fileno())
    return np.array([status.st_size, status.st_mtime_ns])


def _fits(starts: np.ndarray, file: BinaryIO) -> bool:
    return len(starts) > 3 and np.array_equal(starts[:2], _identity(file)) and starts[-1] == starts[0]


def _found(path: Path, file: BinaryIO) -> np.ndarray:
    ends, size = [np.zeros(1, np.int64)], 0
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (size + 1))
        size += len(block)
    starts = np.concatenate(ends)
    if starts[-1] != size:
        starts = np.append(starts, size)
    if len(starts) < 2:
        raise DataError(f"The manifest {path} is empty. Did the step that writes it finish?")
    return starts
