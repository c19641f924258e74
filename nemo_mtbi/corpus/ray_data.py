"""A corpus step on a Ray cluster, by Ray Data: a pool of workers, each with its function (and GPU), fed with items and
kept from running ahead of who reads the results; Ray starts a worker that has died again, elsewhere if need be.

All nodes have this package and see the same files under the same paths.
"""

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import format_exc
from typing import Any

from nemo_mtbi.errors import ConfigError, MTBIError

log = logging.getLogger(__name__)
CONNECT_SECONDS = 5.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}  # sends nothing


@dataclass
class RayConfig:
    """The cluster of ``executor=ray``.

    Attributes:
        address: ``auto`` (the one that this machine belongs to) or ``host:port``; None: one of this machine alone,
            which ends with the command.
        cpus, gpus: of each worker; gpus null: one where the cluster has any.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None


class Worker:
    """What an actor of the pool holds: the function of a step."""

    def __init__(self, make: bytes, folder: str) -> None:
        os.chdir(folder)  # where relative paths begin
        make_work = pickle.loads(make)
        try:
            self.work = make_work(0)  # Ray gives each worker the GPU that it may use as its first
        except MTBIError as error:
            failure = error

            def fail(item: Any) -> Any:
                raise failure

            self.work = fail

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [pickle.dumps(self._result(pickle.loads(item))) for item in batch["item"]]}

    def _result(self, item: Any) -> Any:
        try:
            return self.work(item)
        except MTBIError as error:
            return Failure(error)
        except Exception as error:
            return Failure(
                MTBIError(f"A worker of the Ray cluster failed: {type(error).__name__}: {error}"), format_exc()
            )


@dataclass(frozen=True)
class Failure:
    """What went wrong in a worker, and would again; a worker that dies is Ray's concern."""

    error: MTBIError
    trace: str = ""


def on_ray(
    make: Callable[[int], Callable[[Any], Any]], items: Sequence[Any], workers: int, config: RayConfig, chunk: int
) -> Iterator[Any]:
    """Results as they come; see :func:`nemo_mtbi.corpus.execution.spread`."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"executor=ray needs Ray (pip install 'nemo-mtbi[ray]'): {error}.") from error
    if not items:
        return
    with connected(ray, config):
        gpus = config.gpus if config.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        blocks = -(-len(items) // chunk)
        rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=blocks)
        done = rows.map_batches(
            Worker,
            fn_constructor_args=(pickle.dumps(make), os.getcwd()),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=config.cpus,
            num_gpus=gpus,
        )
        try:
            for row in done.iter_rows():
                result = pickle.loads(row["result"])
                if isinstance(result, Failure):
                    if result.trace:
                        log.error(result.trace)
                    raise result.error
                yield result
        except ray.exceptions.RayError as error:
            raise MTBIError(
                f"The Ray cluster failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}. What is "
                "finished is kept: run the same command again."
            ) from error


@contextmanager
def connected(ray: Any, config: RayConfig) -> Iterator[None]:
    """A session with the cluster; one that is there already is used and left alone.

    Raises:
        ConfigError: no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    if config.address not in (None, "auto", "local"):
        answers(str(config.address))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        ray.init(
            address=config.address or "local",
            include_dashboard=False if config.address is None else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"ray.address={config.address}: {str(error).strip().splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def answers(address: str) -> None:
    """
    Raises:
        ConfigError: nothing listens at ``host:port``.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host or "127.0.0.1", int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"ray.address={address}: no Ray cluster answers there ({error}). Give host:port of `ray start --head`, "
            "auto, or null for this machine alone."
        ) from error
