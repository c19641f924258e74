"""Work over many items in several processes of this machine, in order and with few items under way."""

import gc
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nemo_mtbi.errors import MTBIError

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNKS_AHEAD = 4  # chunks under way for each process
IMPORTED = ["nemo_mtbi.registration"]  # by what fresh processes begin with: NeMo takes 10 s

_work: Callable[[range], list[Any]] | None = None  # of this worker process


def in_processes(
    make: Callable[[int], Callable[[Item], Result]],
    items: Sequence[Item],
    workers: int,
    chunk: int = 8,
    fresh: bool = False,
) -> Iterator[Result]:
    """Results in the order of the items.

    Args:
        make: number of a worker -> its function, made once in each.
        items: what the functions are called with.
        workers: processes; 1: this one.
        chunk: items that a process takes at once.
        fresh: the processes begin with imported modules, and without threads or CUDA contexts of this one; ``make`` and
            the items are pickled. Otherwise they are forks of this one, which begin at once.

    Raises:
        MTBIError: a process has died; what was given before is valid.
    """
    if workers == 1 or len(items) <= chunk:
        yield from map(make(0), items)
        return
    context = multiprocessing.get_context("forkserver" if fresh else "fork")
    if fresh:
        context.set_forkserver_preload(IMPORTED)
    if not fresh:
        gc.freeze()  # or the workers' garbage collections would copy every page of this process
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    begins, under_way = iter(range(0, len(items), chunk)), deque[Future[list[Result]]]()
    pool, ended = ProcessPoolExecutor(workers, context, _begin, (make, items, numbers)), False
    try:
        while True:
            while len(under_way) < workers * CHUNKS_AHEAD and (begin := next(begins, None)) is not None:
                under_way.append(pool.submit(_chunk, range(begin, min(begin + chunk, len(items)))))
            if not under_way:
                ended = True
                return
            yield from under_way.popleft().result()
    except BrokenProcessPool as error:
        raise MTBIError(
            "A worker process has died, perhaps of too little memory. What is finished is kept: run the same command "
            "again, with workers=1 if it comes back."
        ) from error
    finally:
        if not ended:  # what they are at may take hours; what they write survives a kill
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(make: Callable[[int], Callable[[Any], Any]], items: Sequence[Any], numbers: Any) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills them
    end_with_parent()
    number, work = numbers.get(), None

    def made_when_needed(places: range) -> list[Any]:  # so that what goes wrong there reaches the parent
        nonlocal work
        work = work or make(number)
        return [work(items[place]) for place in places]

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
