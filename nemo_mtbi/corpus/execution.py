"""Who does the work of a corpus step: processes of this machine, or a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from nemo_mtbi.corpus.processes import in_processes
from nemo_mtbi.corpus.ray_data import RayConfig, on_ray
from nemo_mtbi.errors import ConfigError

LOCAL, RAY = "local", "ray"
Item = TypeVar("Item")
Result = TypeVar("Result")


def check_execution(executor: str, workers: int) -> None:
    """
    Raises:
        ConfigError: an unknown executor, or no worker.
    """
    if executor not in (LOCAL, RAY):
        raise ConfigError(f"executor={executor!r}: use {LOCAL} or {RAY}.")
    if workers < 1:
        raise ConfigError(f"workers={workers}: give at least 1.")


def spread(
    make: Callable[[int], Callable[[Item], Result]],
    items: Sequence[Item],
    executor: str,
    workers: int,
    ray: RayConfig,
    *,
    chunk: int = 1,
    fresh: bool = False,
    died: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """Results of all items: of ``local`` in their order, of ``ray`` as they come.

    Args:
        make: number of a worker -> its function, made once in each; pickled where workers do not fork.
        items: what the functions are called with.
        executor, workers, ray: who works.
        chunk: items that a worker takes at once.
        fresh: local workers are no forks of this process (:func:`nemo_mtbi.corpus.processes.in_processes`).
        died: result of an item of which local workers die.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
        MTBIError: workers have died.
    """
    check_execution(executor, workers)
    if executor == RAY:
        return on_ray(make, items, workers, ray, chunk)
    return in_processes(make, items, workers, chunk, fresh, died)
