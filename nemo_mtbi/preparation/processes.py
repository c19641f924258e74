"""A function over many items in several processes of this machine, in order and with few items under way."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nemo_mtbi.errors import MTBIError

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK, CHUNKS_AHEAD = 8, 4  # items that a process takes at once; chunks under way for each process

_work: tuple[Callable[[Any], Any], Sequence[Any]] | None = None  # what forked processes inherit


def in_processes(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Results in the order of the items.

    The processes are forked, so neither the function nor the items are sent to them; results are.

    Raises:
        MTBIError: a process has died; what was given before is valid.
    """
    if workers == 1 or len(items) <= CHUNK:
        yield from map(function, items)
        return
    global _work
    _work = function, items
    begins, under_way = iter(range(0, len(items), CHUNK)), deque[Future[list[Result]]]()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _ignore_interrupts)
    try:
        while True:
            while len(under_way) < workers * CHUNKS_AHEAD and (begin := next(begins, None)) is not None:
                under_way.append(pool.submit(_chunk, begin))
            if not under_way:
                return
            yield from under_way.popleft().result()
    except BrokenProcessPool as error:
        raise MTBIError(
            "A worker process has died, perhaps of too little memory. What is finished is kept: run the same command "
            "again, with workers=1 if it comes back."
        ) from error
    finally:
        _work = None
        pool.shutdown(wait=True, cancel_futures=True)


def _chunk(begin: int) -> list[Any]:
    assert _work is not None
    function, items = _work
    return [function(item) for item in items[begin : begin + CHUNK]]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends them
