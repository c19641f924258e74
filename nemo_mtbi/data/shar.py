"""Lhotse Shar whose cuts can be drawn from any place on, and before their audio and arrays are read.

A resumed run draws some of what it has trained on again. Of that the metadata is enough (:func:`without_data`): a cut
that is still to come, because it waits in a buffer of the sampler, gets its data when a batch needs it
(:class:`PromisedCut`).
"""

import copy
import random
import tarfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.dataloading import resolve_seed
from lhotse.lazy import LazyIteratorMultiplexer
from lhotse.serialization import decode_json_line, deserialize_item, extension_contains
from lhotse.shar.readers.lazy import LazySharIterator
from lhotse.shar.readers.tar import TarIterator, parse_tarinfo
from lhotse.shar.utils import fill_shar_placeholder

from nemo_mtbi.data.cut_lines import readable
from nemo_mtbi.errors import DataError

PROMISE_FIELD = "promised"
SHARD = 2**32  # a place is a shard times this, and a number in it: what comes before is not counted


class _Reading:
    data = True  # of this process; a sampler may draw in a thread of its own


@contextmanager
def without_data() -> Iterator[None]:
    """Shar gives promised cuts meanwhile."""
    before, _Reading.data = _Reading.data, False
    try:
        yield
    finally:
        _Reading.data = before


class PromisedCut:
    """A cut's place in a Shar. All that are still promised of one shard are read together."""

    def __init__(self, shar: "SharVisits", shard: int, position: int, cut_id: str) -> None:
        self.shar, self.shard, self.position, self.cut_id = shar, shard, position, cut_id
        self.cut: Cut | None = None

    def read(self) -> Cut:
        """The cut with its data.

        Raises:
            DataError: the shard cannot be read, or is not what was drawn from.
        """
        if self.cut is None:
            self.shar.keep_promises(self)
        if self.cut is None or self.cut.id != self.cut_id:
            found = "ends before it" if self.cut is None else f"now has {self.cut.id} there"
            raise DataError(
                f"{self.cut_id} was drawn from {self.shar.source.shards[self.shard]['cuts']}, which {found}. Did the "
                "Shar change while it was read?"
            )
        return self.cut


class SharVisits:
    """Cuts of a Shar, shard after shard; the order of the shards is of the seed and the ``visit``.

    Args:
        source: Lhotse's reader, with shuffled shards or not.
        seed: of the order; None: the reader's.
    """

    def __init__(self, source: LazySharIterator, seed: int | str | None = None) -> None:
        self.source, self.visit = source, 0
        self.seed = source.seed if seed is None else seed
        self.promised: dict[int, weakref.WeakSet[PromisedCut]] = defaultdict(weakref.WeakSet)
        self.changing = threading.Lock()  # a bucketing sampler may draw in a thread of its own

    def __getstate__(self) -> dict[str, Any]:
        # promises are kept where they were given
        return {"source": self.source, "seed": self.seed, "visit": self.visit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"], state["seed"])  # type: ignore[misc]
        self.visit = state["visit"]

    def __iter__(self) -> Iterator[Cut]:
        if self.source.slice_length is not None:  # which cuts those are is drawn while they are read
            self.source.epoch = self.visit
            yield from self.source
            return
        yield from (cut for _, _, cut in self.placed())

    def placed(self, begin: int = 0) -> Iterator[tuple[int, int, Cut]]:
        """The cuts from one on, each with its place in the order of this visit (see :data:`SHARD`) and in the Shar."""
        order = list(range(self.source.num_shards))
        if self.source.shuffle_shards:
            random.Random(resolve_seed(self.seed) + self.visit).shuffle(order)
        first, position = divmod(begin, SHARD)
        for at, shard in enumerate(order[first:], first):
            for number, cut in enumerate(self._cuts(shard, position), position):
                yield at * SHARD + number, shard * SHARD + number, cut
            position = 0

    def at(self, places: Iterable[int]) -> Iterator[Cut]:
        """The cuts of some places in the Shar, without their data (:class:`PromisedCut`). Only the metadata of their
        shards is read.

        Raises:
            DataError: it no longer has them.
        """
        places = list(places)
        wanted: dict[int, set[int]] = defaultdict(set)
        for place in places:
            wanted[place // SHARD].add(place % SHARD)
        found: dict[int, Cut] = {}
        for shard, positions in wanted.items():
            if shard >= self.source.num_shards:
                continue
            cuts = islice(self._shard(shard, False), max(positions) + 1)
            for position, cut in enumerate(readable(cuts, self._named(shard))):
                if position in positions:
                    found[shard * SHARD + position] = cut
        for place in places:
            shard, position = divmod(place, SHARD)
            if place not in found:
                raise DataError(
                    f"The Shar of {self.source.shards[0]['cuts']} has no cut {position + 1} in a shard {shard + 1}, "
                    "which is still to be trained on. Did the Shar change since the run was stopped?"
                )
            yield self._promise(copy.copy(found[place]), shard, position)

    def _promise(self, cut: Cut, shard: int, position: int) -> Cut:
        promise = PromisedCut(self, shard, position, cut.id)
        with self.changing:
            self.promised[shard].add(promise)
        cut.custom = {**(cut.custom or {}), PROMISE_FIELD: promise}
        return cut

    def _cuts(self, shard: int, begin: int) -> Iterator[Cut]:
        position, with_data = begin, _Reading.data
        cuts = readable(islice(self._shard(shard, with_data), begin, None), self._named(shard))
        while True:
            if _Reading.data and not with_data:
                cuts, with_data = readable(islice(self._shard(shard, True), position, None), self._named(shard)), True
            try:
                cut = next(cuts)
            except StopIteration:
                return
            if not with_data:
                cut = self._promise(cut, shard, position)
            position += 1
            yield cut

    def _named(self, shard: int) -> str:
        return f"The shard {self.source.shards[shard]['cuts']} (or what belongs to it)"

    def _shard(self, shard: int, with_data: bool) -> Iterator[Cut]:
        files = self.source.shards[shard].items()
        fields = {field: [file] for field, file in files if with_data or not extension_contains(".tar", file)}
        return iter(LazySharIterator(fields, cut_map_fns=[self.source.cut_map_fns[shard]]))

    def keep_promises(self, first: PromisedCut) -> None:
        """Read a cut, and the others that are promised of its shard."""
        with self.changing:
            promises = {first, *self.promised.pop(first.shard, ())}
        waiting = defaultdict(list)
        for promise in promises:
            waiting[promise.position].append(promise)
        for position, cut in readable(self._cuts_at(first.shard, set(waiting)), self._named(first.shard)):
            for promise in waiting[position]:
                promise.cut = cut

    def _cuts_at(self, shard: int, positions: set[int]) -> Iterator[tuple[int, Cut]]:
        """Cuts with their data, and the positions."""
        last = max(positions)
        cuts = enumerate(islice(self._shard(shard, False), last + 1))
        own = {position: cut for position, cut in cuts if position in positions}
        for field, file in self.source.shards[shard].items():
            if not extension_contains(".tar", file):
                continue
            for position, name, value in _members(file, positions):
                if position in own and value is not None:
                    assert name == own[position].id, f"{file} holds {name} where the cuts have {own[position].id}"
                    setattr(own[position], field, value)
        yield from own.items()


def _members(file: Any, positions: set[int]) -> Iterator[tuple[int, str, Any]]:
    """Position, cut and manifest with data of entries of a tar file. Of a file on a disk only these are read."""
    last = max(positions)
    try:
        tar = tarfile.open(file, "r:") if Path(file).is_file() else None
    except tarfile.ReadError:  # compressed
        tar = None
    if tar is None:
        for position, (value, path) in enumerate(islice(TarIterator(file), last + 1)):
            if position in positions:
                yield position, str(path.parent / path.stem), value
        return
    with tar:
        members = iter(tar)  # from header to header
        for position, member in enumerate(members):
            described = next(members, None)
            if position in positions and described is not None:
                data, path = parse_tarinfo(member, tar)
                text, _ = parse_tarinfo(described, tar)
                value = None
                if text is not None:
                    value = deserialize_item(decode_json_line(text.decode()))
                    fill_shar_placeholder(manifest=value, data=data, tarpath=path)
                yield position, str(path.parent / path.stem), value
            if position == last:
                return


def with_visits(cuts: CutSet, seed: int | str | None = None) -> tuple[CutSet, list[SharVisits]]:
    """The cuts of one Shar or of several that NeMo mixes, and their readers; none for other sources.

    Args:
        seed: of the order of shards; None: as the readers have it.
    """
    if isinstance(cuts.data, LazySharIterator):
        reader = SharVisits(cuts.data, seed)
        return CutSet(reader), [reader]
    if isinstance(cuts.data, LazyIteratorMultiplexer):
        mixed = cuts.data
        inside = mixed.iterators if hasattr(mixed, "iterators") else mixed.sources  # Lhotse 2.0
        parts = [with_visits(part if isinstance(part, CutSet) else CutSet(part), seed) for part in inside]
        own = LazyIteratorMultiplexer(
            *(part for part, _ in parts), stop_early=mixed.stop_early, weights=mixed.weights, seed=mixed.seed
        )
        return CutSet(own), [reader for _, readers in parts for reader in readers]
    return cuts, []


def promise_of(cut: Cut) -> PromisedCut | None:
    """None if the cut has its data."""
    return (cut.custom or {}).get(PROMISE_FIELD)
