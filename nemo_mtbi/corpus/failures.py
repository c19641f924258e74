"""What a full disk or a file system without locks makes fail, as messages."""

import errno
import os
import re
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lhotse.audio import AudioSource
from lhotse.cut import Cut, MixedCut
from lhotse.cut.data import DataCut

from nemo_mtbi.errors import DataError

FULL_OR_LOST = (errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOTCONN)  # disks
UNWRITABLE = (
    *FULL_OR_LOST,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOLCK,
    errno.ENOTDIR,
    errno.EEXIST,
)
# Not a recording's fault, though reading or writing it has failed.
OF_THE_MACHINE = (*FULL_OR_LOST, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


SAID = re.compile(r"\[Errno (\d+)\]")  # Lhotse's AudioLoadingError has what its backends raised as text alone


def raise_if_of_the_machine(error: BaseException, sources: Iterable[AudioSource] = ()) -> None:
    """
    Args:
        error: with which a recording could not be read.
        sources: of that recording; its files are opened, and say why that fails.

    Raises:
        OSError, MemoryError: the reason is a full disk, a lost mount, too little memory.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in OF_THE_MACHINE):
            raise cause
        for number in map(int, SAID.findall(str(cause))):
            if number in OF_THE_MACHINE:
                raise OSError(number, os.strerror(number)) from error
        cause = cause.__cause__ or cause.__context__
    for source in sources:
        if source.type != "file":
            continue
        try:
            with open(source.source, "rb") as file:
                file.read(1)
        except OSError as reason:
            if reason.errno in OF_THE_MACHINE:
                raise reason from error


def sources_of(cut: Cut) -> list[AudioSource]:
    """Of the recordings of a cut and its tracks."""
    parts = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    return [s for part in parts if isinstance(part, DataCut) and part.has_recording for s in part.recording.sources]


def require_room(folder: Path, size: int) -> None:
    """
    Raises:
        OSError: so many bytes cannot be written there.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(size))
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, step: str) -> Iterator[None]:
    """One command at a time.

    Raises:
        DataError: another one works on the folder.
    """
    try:
        with FileLock(folder / f"{step}.lock", blocking=False):
            yield
    except Timeout:
        raise DataError(f"Another command fills {folder}. Wait for it, or end it.") from None


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Failures to write, wherever they happen, as messages.

    Raises:
        DataError: the disk is full, or the folder cannot be written or locked.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise DataError(
            f"index.sqlite under {folder}: {error}. Make room or delete that file; it is made anew."
        ) from error
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise DataError(
            f"Cannot write under {folder}: {error}. Make room, or use a folder that can be written and locked (flock); "
            "the same command continues where this one stopped."
        ) from error
