"""Launchers that another launcher runs, each in a process of its own.

Where it is safe the processes are forked from one that has imported NeMo, which takes 5 to 15 s, and computed nothing.
"""

import atexit
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nemo_mtbi import console

PRELOADED = ["nemo_mtbi.models.mtbi_salm", "nemo_mtbi.training.stages", "nemo_mtbi.targets.generate"]
GPU_DRIVERS = (
    "/dev/nvidiactl",
    "/dev/kfd",
    "/dev/dxg",
    "/dev/nvmap",
)  # a library that has looked for GPUs cannot be forked
_peaks: list[float] = []


def run_launcher(module: str, arguments: list[str]) -> int:
    """Run a launcher, with the terminal that this process was started with; its exit code, or less the signal that
    ended it.

    Args:
        module: under ``nemo_mtbi.examples``.
        arguments: of its command line.
    """
    if sys.platform != "linux" or any(Path(driver).exists() for driver in GPU_DRIVERS):
        return console.run([sys.executable, "-m", f"nemo_mtbi.examples.{module}", *arguments])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    streams = [Descriptor(number) for number in console.descriptors()]
    environment = dict(os.environ) | {console.STEP: "1"}
    receiving, sending = context.Pipe(duplex=False)
    settings = environment, multiprocessing.get_start_method(), os.getcwd()
    process = context.Process(target=_main, args=(module, arguments, *settings, sending, *streams))
    process.start()
    sending.close()
    process.join()
    if receiving.poll():  # not waited for: a process that a killed one has left behind may hold the other end
        with suppress(EOFError):
            _peaks.append(receiving.recv())
    assert process.exitcode is not None
    return process.exitcode


def peak_gib() -> float:
    """Largest resident memory of a process of the launchers that have been run."""
    return max([_used(resource.RUSAGE_CHILDREN), *_peaks])


def _used(whose: int) -> float:
    return resource.getrusage(whose).ru_maxrss / 2**20


class Descriptor:
    """A file descriptor that is handed to a process which is not a child of this one."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (reduction.DupFd(self.number),)


def _received(given: Any) -> int:
    return given.detach()


def _end_with_launcher() -> None:
    """End this step when the launcher that it belongs to is killed: nobody waits for it, and the same command would run
    it a second time."""
    if (launcher := multiprocessing.parent_process()) is not None:
        launcher.join()
        os.kill(os.getpid(), signal.SIGTERM)  # a training writes a checkpoint first


def _main(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    method: str,
    folder: str,
    peak: Connection,
    out: int,
    err: int,
) -> None:
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    multiprocessing.set_start_method(method, force=True)  # or a loader's workers would import everything anew, and fail
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, stream in ((out, 1), (err, 2)):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    launcher = importlib.import_module(f"nemo_mtbi.examples.{module}")
    sys.modules["__main__"] = launcher  # what Lightning starts other ranks with
    sys.argv = [str(launcher.__file__), *arguments]
    try:
        sys.exit(launcher.main())
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
        peak.send(max(_used(resource.RUSAGE_SELF), _used(resource.RUSAGE_CHILDREN)))
