"""Training batches in segments, so that a resumed run begins close to where it was and draws nothing of before.

Lhotse's samplers find their place by drawing everything again (0.4 ms an example). Here a new sampler takes over after
every ``SEGMENT_BATCHES`` batches: it begins with the examples that waited in the buckets of the one before, and goes
on with the next line. Where that is goes into the checkpoints; a resumed run makes the sampler of its segment and
draws what is left, at most ``SEGMENT_BATCHES`` batches.

Letters: E entries of ``input_cfg``, W waiting examples.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from lhotse import CutSet
from torch import Tensor

from nemo_mtbi.data.conversation import MTBIConversation, Origin

SEGMENT_BATCHES = 1000  # of a rank; about as many as a run may draw again
KEPT_PLACES = 3  # the loader's workers are ahead of the steps, by less than two segments


@dataclass
class Place:
    """Where a segment begins.

    Attributes:
        last: (E, 3), of each entry the visit, number in its order and target of the example that was drawn last;
            -1 where none was.
        waiting: (W, 5), the :class:`~nemo_mtbi.data.conversation.Origin` of examples that were drawn and are in no
            batch yet, in the order in which they were drawn.
    """

    last: Tensor
    waiting: Tensor

    def of_entry(self, number: int) -> str:
        """``place`` of an entry, see :class:`~nemo_mtbi.data.conversation.ConversationIterator`."""
        last = self.last[number].tolist()
        waiting = self.waiting[self.waiting[:, 0] == number, 1:].tolist()
        return json.dumps({"last": last if last[0] >= 0 else None, "waiting": waiting})


class Drawn:
    """The examples of a sampler, which it knows until they are in a batch."""

    def __init__(self, cuts: CutSet, entries: int, place: Place | None) -> None:
        self.cuts = cuts
        self.last: list[list[int]] = place.last.tolist() if place else [[-1, -1, -1] for _ in range(entries)]
        # Those that wait from the beginning: an entry that is seldom drawn from may not give all in this segment.
        self.waiting = {Origin(*row): None for row in (place.waiting.tolist() if place else ())}

    def __iter__(self) -> Iterator[MTBIConversation]:
        before = set(self.waiting)
        for example in self.cuts:
            origin = example.origin
            assert origin is not None
            if origin not in before:
                self.waiting[origin] = None
                self.last[origin.entry] = [origin.visit, origin.at, origin.target]
            yield example

    def taken(self, batch: CutSet) -> None:
        for example in batch:
            del self.waiting[example.origin]

    def place(self) -> Place:
        waiting = torch.tensor([list(origin) for origin in self.waiting], dtype=torch.int64).reshape(-1, 5)
        return Place(torch.tensor(self.last, dtype=torch.int64), waiting)


class Segments:
    """Batches of one segment after the other.

    Args:
        sampler_of: makes a Lhotse sampler of a segment's number and place (None: the beginning of the data).
        entries: E.
        first: segment to begin with, and its place.
        batches: of a segment.
    """

    def __init__(
        self,
        sampler_of: Callable[[int, Place | None], Any],
        entries: int,
        first: tuple[int, Place | None] = (0, None),
        batches: int = SEGMENT_BATCHES,
    ) -> None:
        self.sampler_of, self.entries, self.first, self.batches = sampler_of, entries, first, batches
        self.places: dict[int, Place | None] = dict([first])

    def __iter__(self) -> Iterator[CutSet]:
        self.places = dict([self.first])
        for number in count(self.first[0]):
            place = self.places[number]
            sampler = self.sampler_of(number, place)
            drawn = Drawn(sampler.cuts[0], self.entries, place)
            sampler.cuts = (CutSet(drawn), *sampler.cuts[1:])
            for taken, batch in enumerate(islice(sampler, self.batches), 1):
                drawn.taken(batch)
                if taken == self.batches:  # a checkpoint may be written before the next batch is drawn
                    self.places[number + 1] = drawn.place()
                    self.places.pop(number + 1 - KEPT_PLACES, None)
                yield batch
            if number + 1 not in self.places:  # the data has an end
                return
