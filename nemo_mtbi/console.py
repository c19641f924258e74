"""What a run shows: our lines, our warnings and one progress bar. What other libraries print goes to the log file.

File descriptors 1 and 2 are redirected, so that it holds for C code and child processes too. ``verbose=true`` sends the
log to the error output instead; standard output carries our lines alone in both cases.
"""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

# In the environment, since steps and ranks are processes of their own.
VERBOSE, LOG_FILE, STEP = "MTBI_VERBOSE", "MTBI_LOG_FILE", "MTBI_STEP"
INTERRUPTED = 130  # exit code after Ctrl-C
SHOWN_WARNINGS = 10


@dataclass
class Terminal:
    """Where our own lines go.

    Attributes:
        out, err: standard and error output as the process was started with.
        log: file of everything else; None before :func:`redirected`, and with ``verbose=true``.
    """

    out: TextIO
    err: TextIO
    log: Path | None


_terminal: Terminal | None = None


def verbose() -> bool:
    """Whether what other libraries print is shown."""
    return os.environ.get(VERBOSE) == "1"


def within_step() -> bool:
    """Whether another launcher runs this one, and says itself where results are."""
    return os.environ.get(STEP) == "1"


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def log_file() -> Path | None:
    """The file that holds what other libraries print."""
    return _terminal.log if _terminal else None


def say(text: str = "") -> None:
    """A line of results, on standard output; once in a job of several processes."""
    if is_first_process():
        _write(_terminal.out if _terminal else sys.stdout, text)


def tell(text: str) -> None:
    """A line about the run (errors, what is left out), on the error output."""
    _write(_terminal.err if _terminal else sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    bars = [bar for bar in list(getattr(tqdm, "_instances", [])) if not bar.disable]
    for bar in bars:
        bar.clear()
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # of a program that has read enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    for bar in bars:
        bar.refresh()


def progress(iterable: Any = None, disable: bool = False, **options: Any) -> Any:
    """tqdm on the terminal, gone when it is done; nothing where the error output is no terminal."""
    stream = _terminal.err if _terminal else sys.stderr
    hidden = disable or not stream.isatty() or not is_first_process() or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(iterable, file=stream, disable=hidden, leave=False, dynamic_ncols=True, **options)


class OurWarnings(logging.Handler):
    """Shows warnings of ``nemo_mtbi`` loggers, the first ones of many."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        if self.count <= SHOWN_WARNINGS:
            tell(f"Warning: {record.getMessage()}")
        elif self.count == SHOWN_WARNINGS + 1:
            tell(f"Warning: more of them are in {log_file() or 'the log'}.")


def open_streams() -> None:
    """Give a process that was started without standard streams (``2>&-``) some that lead nowhere."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the first number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))


@contextmanager
def redirected(log: Path | None) -> Iterator[None]:
    """Send what is printed to ``log`` (None: a temporary file that stays only if the run fails, or has
    more to say than is shown).

    The redirection outlasts a run that ends well, since libraries print when the process ends too; an exception undoes
    it, so that its traceback is seen.
    """
    global _terminal
    if _terminal is not None:
        yield
        return
    open_streams()
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    target, path, temporary = _open_log(log) if not verbose() else (os.dup(2), None, False)
    if path is not None:
        os.environ[LOG_FILE] = str(path)
    _terminal = Terminal(_text(out), _text(err), path)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.close(target)
    ours = logging.getLogger("nemo_mtbi")
    handler = OurWarnings()
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    failed = False
    try:
        yield
    except SystemExit as error:  # its message is shown already, or is in the log
        failed = error.code not in (None, 0)
        if temporary and failed and path is not None and path.stat().st_size:
            tell(f"Log: {path}")
        raise
    except BaseException as error:
        failed = True
        with suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os.dup2(out, 1)
        os.dup2(err, 2)
        ours.removeHandler(handler)
        _terminal = None
        if path is not None and not isinstance(error, KeyboardInterrupt):
            tell(f"Log: {path}")
        raise
    finally:
        if temporary and path is not None and path.exists():
            nothing = not path.stat().st_size
            if nothing or (not failed and handler.count <= SHOWN_WARNINGS):
                path.unlink(missing_ok=True)


def run(command: list[str]) -> int:
    """Run a step of this run, with the terminal that this process was started with; its exit code."""
    streams = {"stdout": _terminal.out, "stderr": _terminal.err} if _terminal else {}
    return subprocess.run(command, env=os.environ | {STEP: "1"}, **streams).returncode  # type: ignore[call-overload]


def descriptors() -> tuple[int, int]:
    """Of standard and error output as this process was started with."""
    return (_terminal.out.fileno(), _terminal.err.fileno()) if _terminal else (1, 2)


def _open_log(log: Path | None) -> tuple[int, Path, bool]:
    """Descriptor, path, and whether it is temporary. Steps append to the log of the launcher that runs them."""
    above = os.environ.get(LOG_FILE)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for path in [Path(p) for p in (above, log) if p is not None]:
        with suppress(OSError):  # e.g. a run on a read-only disk
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags, 0o644), path, False
    descriptor, name = tempfile.mkstemp(prefix="mtbi-", suffix=".log")
    return descriptor, Path(name), True


def _text(descriptor: int) -> TextIO:
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
