"""Launchers in processes of their own, forked from a server that has imported NeMo (10 s) and computed nothing."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nemo_mtbi.models", "nemo_mtbi.training.stages", "nemo_mtbi.evaluation.benchmark"])


def launch(name, *overrides, ok=True, cwd=None, ranks=1):
    """Run a launcher and give what it printed; ``ranks`` > 1 starts it under torchrun."""
    arguments = list(map(str, overrides))
    code, output = _torchrun(name, arguments, cwd, ranks) if ranks > 1 else _fork(name, arguments, cwd)
    assert (code == 0) == ok, output[-6000:]
    return output


def _torchrun(name, arguments, cwd, ranks):
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=29541"]
    command = [sys.executable, *torchrun, "-m", f"nemo_mtbi.examples.{name}", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return run.returncode, run.stdout + run.stderr


def _fork(name, arguments, cwd):
    with tempfile.NamedTemporaryFile() as printed:
        process = CONTEXT.Process(target=_main, args=(name, arguments, str(cwd or os.getcwd()), printed.name))
        process.start()
        process.join()
        return process.exitcode, Path(printed.name).read_text(errors="replace")


class Started:
    """A launcher that runs; the part of ``subprocess.Popen`` that tests need."""

    def __init__(self, name, arguments):
        with tempfile.NamedTemporaryFile(delete=False) as printed:
            self.printed = Path(printed.name)
        arguments = (name, list(map(str, arguments)), os.getcwd(), printed.name)
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

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.printed.read_text(errors="replace")[-4000:])
        return self.printed.read_text(errors="replace"), None


def _main(name, arguments, cwd, printed):
    os.chdir(cwd)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    module = importlib.import_module(f"nemo_mtbi.examples.{name}")
    sys.argv = [str(module.__file__), *arguments]
    module.main()
