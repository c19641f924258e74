"""Lhotse Shar whose cuts can be drawn before their audio and arrays are read.

A resumed run finds its place by drawing what it has trained on again. Of that the metadata is enough
(:func:`without_data`): a cut that is still to come, because it waits in a buffer of the sampler, gets its data when a
batch needs it (:class:`PromisedCut`).
"""

import random
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.dataloading import resolve_seed
from lhotse.lazy import LazyIteratorMultiplexer
from lhotse.shar.readers.lazy import LazySharIterator

from nemo_mtbi.data.cut_lines import readable
from nemo_mtbi.errors import DataError

PROMISE_FIELD = "promised"


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
        shar.promised[shard].add(self)

    def read(self) -> Cut:
        """The cut with its data.

        Raises:
            DataError: the shard cannot be read, or is not what was drawn from.
        """
        if self.cut is None:
            self.shar.keep_promises(self.shard)
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
    """

    def __init__(self, source: LazySharIterator) -> None:
        self.source, self.visit = source, 0
        self.promised: dict[int, weakref.WeakSet[PromisedCut]] = defaultdict(weakref.WeakSet)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"promised": defaultdict(weakref.WeakSet)}  # promises are kept where they were given

    def __iter__(self) -> Iterator[Cut]:
        if self.source.slice_length is not None:  # which cuts those are is drawn while they are read
            self.source.epoch = self.visit
            yield from self.source
            return
        order = list(range(self.source.num_shards))
        if self.source.shuffle_shards:
            random.Random(resolve_seed(self.source.seed) + self.visit).shuffle(order)
        for shard in order:
            yield from self._cuts(shard)

    def _cuts(self, shard: int) -> Iterator[Cut]:
        position, with_data = 0, _Reading.data
        cuts = self._shard(shard, with_data)
        while True:
            if _Reading.data and not with_data:
                cuts, with_data = islice(self._shard(shard, True), position, None), True
            try:
                cut = next(cuts)
            except StopIteration:
                return
            if not with_data:
                cut.custom = {**(cut.custom or {}), PROMISE_FIELD: PromisedCut(self, shard, position, cut.id)}
            position += 1
            yield cut

    def _shard(self, shard: int, with_data: bool) -> Iterator[Cut]:
        files = self.source.shards[shard]
        fields = {field: [file] for field, file in files.items() if with_data or field == "cuts"}
        return iter(LazySharIterator(fields, cut_map_fns=[self.source.cut_map_fns[shard]]))

    def keep_promises(self, shard: int) -> None:
        """Read a shard up to the last cut that is promised of it."""
        waiting = defaultdict(list)
        for promise in self.promised.pop(shard):
            waiting[promise.position].append(promise)
        last = max(waiting)
        for position, cut in enumerate(islice(readable(CutSet(self._shard(shard, True))), last + 1)):
            for promise in waiting[position]:
                promise.cut = cut


def with_visits(cuts: CutSet) -> tuple[CutSet, list[SharVisits]]:
    """The cuts of one Shar or of several that NeMo mixes, and their readers; none for other sources."""
    if isinstance(cuts.data, LazySharIterator):
        reader = SharVisits(cuts.data)
        return CutSet(reader), [reader]
    if isinstance(cuts.data, LazyIteratorMultiplexer):
        mixed = cuts.data
        parts = [with_visits(part if isinstance(part, CutSet) else CutSet(part)) for part in mixed.iterators]
        own = LazyIteratorMultiplexer(
            *(part for part, _ in parts), stop_early=mixed.stop_early, weights=mixed.weights, seed=mixed.seed
        )
        return CutSet(own), [reader for _, readers in parts for reader in readers]
    return cuts, []


def promise_of(cut: Cut) -> PromisedCut | None:
    """None if the cut has its data."""
    return (cut.custom or {}).get(PROMISE_FIELD)
