"""Line-oriented result files that survive a crash: every line is complete or absent."""

import errno
import gzip
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nemo_mtbi.errors import DataError


def repair(path: Path) -> None:
    """Cut off an incomplete last line, which a killed writer may have left."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as stream:
        size = stream.seek(0, os.SEEK_END)
        position = size
        while position > 0:
            step = min(1 << 16, position)
            stream.seek(position - step)
            block = stream.read(step)
            newline = block.rfind(b"\n")
            if newline >= 0:
                stream.truncate(position - step + newline + 1)
                return
            position -= step
        stream.truncate(0)


def dumps(record: dict[str, Any]) -> str:
    """One line, without its end; with half a character in it, which no UTF-8 has, in ASCII alone."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return line


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file as dictionaries; nothing if it does not exist."""
    if path.exists():
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                yield parsed(path, number, line)


def parsed(path: Path, place: int | str, line: str | bytes) -> dict[str, Any]:
    """A line of a file as a dictionary; ``place``: its number, or what else tells where it is.

    Raises:
        DataError: it is no JSON.
    """
    try:
        return json.loads(line)
    except ValueError as error:  # text that is no UTF-8 too
        where = f"line {place}" if isinstance(place, int) else place
        raise DataError(f"{path}, {where} is no JSON ({error}). Remove that line.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Appender:
    """Appends dictionaries; each line reaches the file in one write."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        repair(path)
        self.file = open(path, "ab", buffering=0)

    def write(self, record: dict[str, Any]) -> int:
        """-> where the line begins, whoever else appends."""
        line = (dumps(record) + "\n").encode()
        if self.file.write(line) != len(line):  # a full disk may take a part without an error
            raise OSError(errno.ENOSPC, "only a part of a line could be written", self.file.name)
        return self.file.tell() - len(line)

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


class Journal(Appender):
    """Lines that are found again by their ``id``; in memory are places alone, so that there may be millions.

    Args:
        path: read now, and appended to.
        kept: what is remembered of a line beside its place; None: the line does not count.
        name: field that tells lines apart.
    """

    def __init__(self, path: Path, kept: Callable[[dict[str, Any]], Any], name: str = "id") -> None:
        super().__init__(path)
        self.kept, self.name, self.places = kept, name, dict[str, tuple[int, Any]]()
        self.stream, place = open(path, "rb"), 0
        for number, line in enumerate(self.stream, 1):
            self._note(parsed(path, number, line), place)
            place += len(line)

    def _note(self, record: dict[str, Any], place: int) -> None:
        kept = self.kept(record)
        if kept is not None:
            self.places[record[self.name]] = place, kept

    def write(self, record: dict[str, Any]) -> int:
        place = super().write(record)
        self._note(record, place)
        return place

    def __enter__(self) -> "Journal":
        return self

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The last line of that id that counts."""
        self.stream.seek(self.places[name][0])
        record = json.loads(self.stream.readline())
        if record[self.name] != name:
            raise DataError(f"{self.file.name} was changed while it was read; run the same command again.")
        return record

    def __exit__(self, *error: Any) -> None:
        self.stream.close()
        super().__exit__(*error)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name and rename it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    with replacing(path, uuid.uuid4().hex) as stream:  # process ids repeat on other machines and in containers
        stream.write(text)


def keep(file: Path) -> None:
    """Let a file that is written outlive a machine that dies, which may else leave its name without what it holds."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def replacing(path: Path, tag: str) -> Iterator[TextIO]:
    """A text file (compressed if its name ends in .gz) that takes its name only when it is complete; ``tag`` ends its
    temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{tag}")
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(temporary, "wt", encoding="utf-8") as stream:
            yield stream
        keep(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
