"""Launchers in processes of their own, forked from a server that has imported NeMo (10 s) and computed nothing."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["nemo_mtbi.models.mtbi_salm", "nemo_mtbi.training.stages", "nemo_mtbi.evaluation.benchmark"]
)


def launch(name, *overrides, ok=True, cwd=None, ranks=1):
    """Run a launcher (or ``cli``) and give what it printed; ``ranks`` > 1 starts it under torchrun."""
    arguments = list(map(str, overrides))
    code, output = _torchrun(name, arguments, cwd, ranks) if ranks > 1 else _fork(name, arguments, cwd)
    assert (code == 0) == ok, output[-6000:]
    return output


def on_ranks(count, worker, *arguments):
    """What each of ``count`` processes of ``worker(rank, *arguments, results)`` puts in ``results[rank]``."""
    with CONTEXT.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(worker, (*arguments, results), count, start_method="forkserver")
        return [results[rank] for rank in range(count)]


def killed_until_done(start, wait, finished, kills, rng, pause, signals=(signal.SIGKILL,)):
    """How often what ``start()`` starts was killed, each time ``wait(process)`` and up to ``pause`` seconds after its
    start, before it ended by itself: when ``finished(process)``."""
    killed = 0
    while True:
        process = start()
        if killed < kills:
            wait(process)
            time.sleep(rng.uniform(0.0, pause))
            chosen = rng.choice(signals)
            if process.poll() is None and not finished(process):
                process.send_signal(chosen)
                killed += 1
        printed = process.communicate(timeout=600)[0]
        if finished(process):
            assert process.returncode == 0, printed[-4000:]
            return killed
        assert process.returncode in (0, -signal.SIGKILL), printed[-4000:]


def _torchrun(name, arguments, cwd, ranks):
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=29541"]
    command = [sys.executable, *torchrun, "-m", f"nemo_mtbi.examples.{name}", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return run.returncode, run.stdout + run.stderr


def _fork(name, arguments, cwd):
    started = Started(name, arguments, cwd)
    output, _ = started.communicate()
    return started.returncode, output


class Started:
    """A launcher that runs; the part of ``subprocess.Popen`` that tests need."""

    def __init__(self, name, arguments, cwd=None, environment=None):
        with tempfile.NamedTemporaryFile(delete=False) as printed:
            self.printed = Path(printed.name)
        arguments = name, arguments, str(cwd or os.getcwd()), printed.name, environment or {}
        self.process = CONTEXT.Process(target=_main, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.process.terminate()

    def wait(self, timeout):
        self.process.join(timeout)
        return self.process.exitcode

    def so_far(self):
        """What it has printed."""
        return self.printed.read_text(errors="replace")

    def communicate(self, timeout=None):
        """All that it printed, when it has ended."""
        self.process.join(timeout)
        ended = not self.process.is_alive()
        output = self.so_far()
        self.printed.unlink()
        if not ended:
            self.process.kill()
            raise TimeoutError(output[-4000:])
        return output, None


def _main(name, arguments, cwd, printed, environment):
    multiprocessing.set_start_method("fork", force=True)  # a process that nobody forked has the platform's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a suite that runs in the background it is ignored
    os.chdir(cwd)
    os.environ.update(environment)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    module = importlib.import_module("nemo_mtbi.cli" if name == "cli" else f"nemo_mtbi.examples.{name}")
    sys.argv = [str(module.__file__), *arguments]
    sys.exit(module.main())
