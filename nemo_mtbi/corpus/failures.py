"""What a full disk or a file system without locks makes fail, as messages."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_mtbi.errors import DataError

FULL_OR_LOST = (errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOTCONN)  # disks
UNWRITABLE = (
    *FULL_OR_LOST,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.ENOLCK,
    errno.ENOTDIR,
    errno.EEXIST,
)
# Not a recording's fault, though reading or writing it has failed.
OF_THE_MACHINE = (*FULL_OR_LOST, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def raise_if_of_the_machine(error: BaseException) -> None:
    """
    Raises:
        OSError, MemoryError: what a recording could not be read for is a full disk, a lost mount, too little memory.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in OF_THE_MACHINE):
            raise cause
        cause = cause.__cause__ or cause.__context__


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
