"""Training batches in segments, so that a resumed run begins close to where it was and draws nothing of before.

Lhotse's samplers find their place by drawing everything again (0.4 ms an example). Here a new sampler takes over after
every ``SEGMENT_BATCHES`` batches: it begins with the examples that waited in the buckets of the one before, and goes
on with the next cut. Where that is goes into the checkpoints; a resumed run makes the sampler of its segment and
draws what is left, at most ``SEGMENT_BATCHES`` batches of every process that draws.

Letters: E entries of ``input_cfg`` (several Shars with weights in one are as many), W waiting examples.
"""

import json
import logging
import random
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import torch
from lhotse import CutSet
from lhotse.dataset.dataloading import resolve_seed
from nemo.collections.common.data.lhotse.dataloader import (
    get_lhotse_sampler_from_config,
    make_structured_with_schema_warnings,
)
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from nemo_mtbi.data.conversation import MTBIConversation, Origin
from nemo_mtbi.training.sections import input_entries, numbers_of

log = logging.getLogger(__name__)

SEGMENT_BATCHES = 1000  # about as many as a process that draws may draw again
KEPT_PLACES = 3  # the loader's workers are ahead of the steps, by less than two segments


@dataclass
class Place:
    """Where a segment begins.

    Attributes:
        last: (E, 3), of each entry the pass, place in its order and target of the example that was drawn last; -1
            where none was.
        waiting: (W, 5), the :class:`~nemo_mtbi.data.conversation.Origin` of examples that were drawn and are in no
            batch yet, in the order in which they were drawn.
    """

    last: Tensor
    waiting: Tensor

    @classmethod
    def beginning(cls, entries: int) -> "Place":
        return cls(torch.full((entries, 3), -1), torch.zeros(0, 5, dtype=torch.int64))

    def packed(self) -> dict[str, Tensor]:
        """For checkpoints, which hold the places of all processes that draw: 4,000 waiting examples in some 20 kB."""
        before = np.zeros((1, self.waiting.shape[1]), np.int64)
        steps = np.diff(self.waiting.numpy(), axis=0, prepend=before)
        packed = zlib.compress(np.ascontiguousarray(steps.T).tobytes())
        return {"last": self.last, "waiting": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}

    @classmethod
    def unpacked(cls, kept: dict[str, Tensor]) -> "Place":
        """What :meth:`packed` gave."""
        steps = np.frombuffer(zlib.decompress(kept["waiting"].numpy().tobytes()), np.int64)
        return cls(kept["last"], torch.from_numpy(steps.reshape(len(Origin._fields), -1).T.cumsum(0)))

    def last_of(self, numbers: Iterable[int]) -> str:
        """``place`` of entries, see :class:`~nemo_mtbi.data.conversation.ConversationIterator`."""
        rows = {number: self.last[number].tolist() for number in numbers}
        return json.dumps({number: {"last": row if row[0] >= 0 else None} for number, row in rows.items()})

    def waiting_of(self, numbers: Iterable[int]) -> str:
        """As :meth:`last_of`, of the examples that wait."""
        rows = {number: self.waiting[self.waiting[:, 0] == number, 1:].tolist() for number in numbers}
        return json.dumps({number: {"waiting": own} for number, own in rows.items()})


class SamplerOf(Protocol):
    """Makes a Lhotse sampler over what comes after a place (None: the beginning), or over what ``waits`` there."""

    def __call__(self, number: int, place: Place | None, waiting: bool = False) -> Any: ...


@dataclass
class SectionSampler:
    """NeMo's samplers of a training section.

    Attributes:
        seed: of the first segment, see Lhotse's ``resolve_seed``.
        bins: of a bucketing sampler that estimates them, as they were estimated once.
    """

    section: DictConfig
    tokenizer: Any
    seed: int | str
    bins: list[float] | None

    def __call__(self, number: int, place: Place | None, waiting: bool = False) -> Any:
        own = self.section.copy()
        # Not a sum: seeds of ranks differ by a constant.
        own.shard_seed = random.Random(f"{resolve_seed(self.seed)}/{number}").randrange(2**31)
        if self.bins is not None:
            own.bucket_duration_bins = self.bins
        if waiting:
            own.force_finite = True
        if place is not None:
            for entry in input_entries(own):
                entry.place = (place.waiting_of if waiting else place.last_of)(numbers_of(entry))
        own = make_structured_with_schema_warnings(own)  # not NeMo's loader, which seeds all generators anew
        return get_lhotse_sampler_from_config(own, global_rank=0, world_size=1, tokenizer=self.tokenizer)[0]


class Drawn:
    """The examples of a sampler, those that waited first, which it knows until they are in a batch."""

    def __init__(self, cuts: CutSet, waiting: Sequence[MTBIConversation], last: Tensor) -> None:
        self.cuts = cuts
        self.last: list[list[int]] = last.tolist()
        self.first = deque(waiting)
        self.waiting = {example.origin: example for example in waiting}

    def __iter__(self) -> Iterator[MTBIConversation]:
        while self.first:
            yield self.first.popleft()  # and keep none that is trained on: they may hold their audio
        for example in self.cuts:
            origin = example.origin
            assert origin is not None
            self.waiting[origin] = example
            self.last[origin.entry] = [origin.visit, origin.at, origin.target]
            yield example

    def taken(self, batch: CutSet) -> None:
        for example in batch:
            del self.waiting[example.origin]

    def place(self) -> Place:
        waiting = torch.tensor([list(origin or ()) for origin in self.waiting], dtype=torch.int64).reshape(-1, 5)
        return Place(torch.tensor(self.last, dtype=torch.int64), waiting)


class Segments:
    """Batches of one segment after the other.

    Args:
        sampler_of: makes the sampler of a segment.
        entries: E.
        first: segment to begin with, and its place (None: the beginning of the data).
        batches: of a segment.
    """

    def __init__(
        self,
        sampler_of: SamplerOf,
        entries: int,
        first: tuple[int, Place | None] = (0, None),
        batches: int = SEGMENT_BATCHES,
    ) -> None:
        self.sampler_of, self.entries, self.first, self.batches = sampler_of, entries, first, batches
        self.places: dict[int, Place | None] = dict([first])

    def __iter__(self) -> Iterator[CutSet]:
        self.places.clear()
        self.places.update([self.first])
        first, place = self.first
        waiting = self._waiting(place)
        for number in count(first):
            sampler = self.sampler_of(number, place)
            drawn = Drawn(sampler.cuts[0], waiting, (place or Place.beginning(self.entries)).last)
            waiting = []
            sampler.cuts = (CutSet(drawn), *sampler.cuts[1:])
            for taken, batch in enumerate(islice(sampler, self.batches), 1):
                drawn.taken(batch)
                if taken == self.batches:  # a checkpoint may be written before the next batch is drawn
                    place, waiting = drawn.place(), list(drawn.waiting.values())
                    self.places[number + 1] = place
                    self.places.pop(number + 1 - KEPT_PLACES, None)
                yield batch
            if number + 1 not in self.places:  # the data has an end
                return

    def _waiting(self, place: Place | None) -> list[MTBIConversation]:
        """Those that wait at a place, read again."""
        if place is None or not len(place.waiting):
            return []
        found = {example.origin: example for example in self.sampler_of(0, place, waiting=True).cuts[0]}
        waiting = [found[origin] for row in place.waiting.tolist() if (origin := Origin(*row)) in found]
        if lacking := len(place.waiting) - len(waiting):
            log.warning(
                f"{lacking} of {len(place.waiting)} examples that were still to be trained on are left out, as the "
                "configuration or the targets of now have it."
            )
        return waiting


@dataclass
class NewPlaces:
    """What a loader's ``worker`` tells with a batch: the places of the segments that it has come to, by number."""

    worker: int
    places: dict[int, Place]


class DrawnByWorkers(IterableDataset):
    """Batches that a loader's workers draw and read, each with :class:`NewPlaces` or None.

    Args:
        dataset: reads a batch.
        sources: of each worker its batches, to be drawn.
    """

    def __init__(self, dataset: Dataset, sources: Sequence[Iterable[CutSet]]) -> None:
        self.dataset, self.sources = dataset, sources

    def __iter__(self) -> Iterator[tuple[Any, NewPlaces | None]]:
        info = get_worker_info()
        worker = info.id if info else 0
        source: Any = self.sources[worker]
        told = -1
        for batch in source:
            places: dict[int, Place | None] = getattr(source, "places", {})
            new = {number: place for number, place in places.items() if number > told and place is not None}
            told = max(places, default=told)
            yield self.dataset[batch], NewPlaces(worker, new) if new else None
