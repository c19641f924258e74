"""Functions for workers of other processes, which import them by name."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from nemo_mtbi.errors import ConfigError, DataError


def doubled(folder: str, worker: int) -> Callable[[int], int]:
    """Doubles, and leaves the process's id in the folder."""
    (Path(folder) / str(os.getpid())).touch()

    def double(item: int) -> int:
        if item < 0:
            raise DataError(f"{item} is negative.")
        time.sleep(0.02)
        return 2 * item

    return double


def dying_once(folder: str, worker: int) -> Callable[[int], int]:
    """Doubles; the first worker that gets 7 dies of it."""

    def double(item: int) -> int:
        mark = Path(folder) / "died"
        if item == 7 and not mark.exists():
            mark.touch()
            os._exit(9)
        return 2 * item

    return double


def impossible(worker: int) -> Callable[[int], int]:
    raise ConfigError("no such model")


def numbered(folder: str, worker: int) -> Callable[[int], int]:
    return lambda item: worker
