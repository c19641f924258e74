"""Work over many items in several processes of this machine, in order and with few items under way."""

import gc
import logging
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nemo_mtbi.errors import MTBIError

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNKS_AHEAD = 4  # chunks under way for each process
NOTHING = -1  # at work
LOST = (
    "A worker process has died, perhaps of too little memory. What is finished is kept: run the same command again, "
    "with workers=1 if it comes back."
)
IMPORTED = ["nemo_mtbi.registration"]  # by what fresh processes begin with: NeMo takes 10 s

_work: Callable[[range], list[Any]] | None = None  # of this worker process


def in_processes(
    make: Callable[[int], Callable[[Item], Result]],
    items: Sequence[Item],
    workers: int,
    chunk: int = 8,
    fresh: bool = False,
    died: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """Results in the order of the items.

    With ``died``, items that were at work when a process died are tried again, each in a process of its own.

    Args:
        make: number of a worker -> its function, made once in each.
        items: what the functions are called with.
        workers: processes; 1: this one.
        chunk: items that a process takes at once.
        fresh: the processes begin with imported modules, and without threads or CUDA contexts of this one; ``make`` and
            the items are pickled. Otherwise they are forks of this one, which begin at once.
        died: the result of an item of which a process of its own has died too; None: any death is an error.

    Raises:
        MTBIError: a process has died; what was given before is valid.
    """
    alone: dict[int, Result] = {}  # by place
    done = 0
    while True:
        try:
            here = workers == 1 or (died is None and len(items) <= chunk)
            for result in map(make(0), items) if here else _together(make, items, workers, chunk, fresh, done, alone):
                done += 1
                yield result
            return
        except _Died as error:
            suspects = [place for place in error.places if place >= done and place not in alone]
            if not suspects or died is None:
                raise MTBIError(LOST) from error
        for place in suspects:
            log.warning(f"A worker process died, perhaps of item {place}; it is tried alone.")
            try:
                [alone[place]] = _together(make, [items[place]], 1, 1, fresh, 0, {})
            except _Died:
                alone[place] = died(items[place])


class _Died(Exception):
    """A worker has, and ``places`` of items were at work."""

    def __init__(self, places: list[int]) -> None:
        super().__init__(places)
        self.places = places


def _together(
    make: Callable[[int], Callable[[Item], Result]],
    items: Sequence[Item],
    workers: int,
    chunk: int,
    fresh: bool,
    done: int,
    known: Mapping[int, Result],
) -> Iterator[Result]:
    """Results from place ``done`` on, in processes; ``known``: of some places.

    Raises:
        _Died: a process has.
    """
    context = multiprocessing.get_context("forkserver" if fresh else "fork")
    if fresh:
        context.set_forkserver_preload(IMPORTED)
    if not fresh:
        gc.freeze()  # or the workers' garbage collections would copy every page of this process
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    begins, under_way = iter(range(done, len(items), chunk)), deque[tuple[int, Future[list[Result]]]]()
    at_work = context.Array("q", [NOTHING] * workers, lock=False)
    arguments = (make, items, numbers, at_work, frozenset(known))
    pool, ended = ProcessPoolExecutor(workers, context, _begin, arguments), False
    try:
        while True:
            while len(under_way) < workers * CHUNKS_AHEAD and (begin := next(begins, None)) is not None:
                places = range(begin, min(begin + chunk, len(items)))
                under_way.append((begin, pool.submit(_chunk, places)))
            if not under_way:
                ended = True
                return
            begin, future = under_way.popleft()
            for place, result in enumerate(future.result(), begin):
                yield known[place] if place in known else result
    except BrokenProcessPool as error:
        raise _Died([place for place in at_work if place != NOTHING]) from error
    finally:
        if not ended:  # what they are at may take hours; what they write survives a kill
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(
    make: Callable[[int], Callable[[Any], Any]], items: Sequence[Any], numbers: Any, at_work: Any, known: frozenset[int]
) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills them
    end_with_parent()
    number, work = numbers.get(), None

    def made_when_needed(places: range) -> list[Any]:  # so that what goes wrong there reaches the parent
        nonlocal work
        work = work or make(number)
        found = []
        for place in places:
            at_work[number] = place
            found.append(None if place in known else work(items[place]))
        at_work[number] = NOTHING
        return found

    _work = made_when_needed


def end_with_parent() -> None:
    """Let this process end at once when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _chunk(places: range) -> list[Any]:
    assert _work is not None
    return _work(places)
