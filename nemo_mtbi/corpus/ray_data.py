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
RESTARTS = 10  # of a worker, which may die again of what it works on
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
    """What an actor of the pool holds: the function of a step, or why it could not be made."""

    def __init__(self, make: bytes, folder: str) -> None:
        self.work: Callable[[Any], Any] | None = None
        try:
            os.chdir(folder)  # where relative paths begin
            self.work = pickle.loads(make)(0)  # Ray gives each worker the GPU that it may use as its first
        except Exception as error:
            self.failure = Failure.of(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [pickle.dumps(self._result(item)) for item in batch["item"]]}

    def _result(self, item: bytes) -> Any:
        if self.work is None:
            return self.failure
        try:
            return self.work(pickle.loads(item))
        except Exception as error:
            return Failure.of(error)


@dataclass(frozen=True)
class Failure:
    """What went wrong in a worker, and would again; a worker that dies is Ray's concern."""

    error: MTBIError
    trace: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        if isinstance(error, MTBIError):
            return cls(error)
        told = MTBIError(f"A worker of the Ray cluster failed: {type(error).__name__}: {error}")
        return cls(told, format_exc())


def on_ray(
    make: Callable[[int], Callable[[Any], Any]], items: Sequence[Any], workers: int, config: RayConfig, chunk: int
) -> Iterator[Any]:
    """Results as they come; see :func:`nemo_mtbi.corpus.execution.spread`."""
    try:
        import ray
        import ray.data
        from ray import cloudpickle  # local functions too
    except ImportError as error:
        raise ConfigError(f"executor=ray needs Ray (pip install 'nemo-mtbi[ray]'): {error}.") from error
    if not items:
        return
    with connected(ray, config):
        needed = {"CPU": config.cpus, "GPU": config.gpus}
        if config.gpus is None:
            needed["GPU"] = float(ray.cluster_resources().get("GPU", 0) > 0)
        require_room(ray.nodes(), needed)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # a shard may take hours
        rows = ray.data.from_items(
            [{"item": cloudpickle.dumps(item)} for item in items], override_num_blocks=-(-len(items) // chunk)
        )
        done = rows.map_batches(
            Worker,
            fn_constructor_args=(cloudpickle.dumps(make), os.getcwd()),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=needed["CPU"],
            num_gpus=needed["GPU"],
            max_restarts=RESTARTS,
            max_task_retries=-1,  # a node that is gone takes many before Ray knows it
        )
        try:
            for row in done.iter_rows():
                result = pickle.loads(row["result"])
                if isinstance(result, Failure):
                    if result.trace:
                        log.error(result.trace)
                    raise result.error
                yield result
        except MTBIError:
            raise
        except Exception as error:  # Ray's own, of several kinds
            said = [line for line in str(error).strip().splitlines() if line.strip()]
            raise MTBIError(
                f"The Ray cluster failed: {type(error).__name__}: {said[-1] if said else ''} What is finished is kept: "
                "run the same command again."
            ) from error


def require_room(nodes: list[dict[str, Any]], needed: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: no node has what one worker takes, so Ray would wait for ever.
    """
    found = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(own.get(name, 0) >= count for name, count in needed.items()) for own in found):
        has = "; ".join(", ".join(f"{own.get(name, 0):g} {name}" for name in needed) for own in found)
        raise ConfigError(
            f"A worker takes {needed['CPU']:g} CPU and {needed['GPU']:g} GPU (ray.cpus, ray.gpus), which no node has "
            f"({has})."
        )


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
