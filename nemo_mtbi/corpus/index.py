"""Where the record of a key is, over all record files of a folder: records are found again when cuts move between
shards."""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from filelock import FileLock

from nemo_mtbi.io import jsonl

Record = dict[str, Any]
LINES_TOGETHER = 100_000
LINES_KEPT = 8


class RecordIndex:
    """An SQLite file that one process at a time brings up to date (only bytes that it has not seen) and any number
    read.

    A line of a record file is a record with a ``key``, or holds several (``{"run": id, "answers": [record, ...]}``).

    Args:
        folder: where the index is.
        files: the record files, in the folder.
    """

    def __init__(self, folder: Path, files: Callable[[], Iterable[Path]]) -> None:
        self.folder, self.files = folder, files
        self._read: dict[tuple[str, int], dict[str, Record]] = {}  # the last lines: neighbours are asked for together
        self.connection: sqlite3.Connection | None = None

    def open(self) -> sqlite3.Connection:
        """The index, brought up to date when it is first opened."""
        if self.connection is None:
            with FileLock(self.folder / "index.lock"):
                self.connection = sqlite3.connect(self.folder / "index.sqlite", timeout=3600)
                self.connection.execute("create table if not exists files (path text primary key, size integer)")
                self.connection.execute(
                    "create table if not exists answers (key text, path text, offset integer, run text)"
                )
                self.connection.execute("create index if not exists by_key on answers (key)")
                for file in sorted(self.files()):
                    self._update(self.connection, file)
                    self.connection.commit()
        return self.connection

    def _update(self, connection: sqlite3.Connection, file: Path) -> None:
        inside = file.is_relative_to(self.folder)
        name, size = str(file.relative_to(self.folder) if inside else file.resolve()), file.stat().st_size
        row = connection.execute("select size from files where path = ?", (name,)).fetchone()
        seen = row[0] if row else 0
        if size == seen:
            return
        if size < seen or (seen and not self._is_longer(connection, file, name, seen)):
            connection.execute("delete from answers where path = ?", (name,))
            seen = 0
        with open(file, "rb") as stream:
            offset = stream.seek(seen)
            for some in batched(takewhile(lambda line: line.endswith(b"\n"), stream), LINES_TOGETHER):
                rows = []
                for line in some:
                    content = jsonl.parsed(file, f"the line at byte {offset}", line)
                    rows += [(r["key"], name, offset, content.get("run", "")) for r in records_of(content)]
                    offset += len(line)
                connection.executemany("insert into answers values (?, ?, ?, ?)", rows)
        connection.execute("insert or replace into files values (?, ?)", (name, offset))

    def _is_longer(self, connection: sqlite3.Connection, file: Path, name: str, seen: int) -> bool:
        """Whether a file is the one whose first ``seen`` bytes were read, and not another one of that name."""
        with open(file, "rb") as stream:
            stream.seek(seen - 1)
            if stream.read(1) != b"\n":
                return False
        query = "select key, offset from answers where path = ? order by offset desc limit 1"
        last = connection.execute(query, (name,)).fetchone()
        return last is None or last[0] in self._line(name, last[1])

    def places(self, key: str, but_run: str | None = None) -> Iterator[tuple[Record, Path]]:
        """Records of that key, of other runs than ``but_run``, each with its folder."""
        found = self.open().execute("select path, offset, run from answers where key = ?", (key,)).fetchall()
        for name, offset, run in found:
            if run == but_run or not (self.folder / name).is_file():
                continue
            record = self._line(name, offset).get(key)
            if record is not None:
                yield record, (self.folder / name).parent

    def _line(self, name: str, offset: int) -> dict[str, Record]:
        found = self._read.pop((name, offset), None)
        if found is None:
            with open(self.folder / name, "rb") as stream:
                stream.seek(offset)
                try:
                    records = records_of(json.loads(stream.readline()))
                except ValueError:  # another file of that name
                    records = []
            found = {r["key"]: r for r in records}
        self._read[name, offset] = found  # the newest
        if len(self._read) > LINES_KEPT:
            del self._read[next(iter(self._read))]
        return found


def batched(lines: Iterator[bytes], count: int) -> Iterator[list[bytes]]:
    while some := list(islice(lines, count)):
        yield some


def records_of(line: Record) -> list[Record]:
    """The records of one line of a record file."""
    return list(line["answers"]) if "answers" in line else [line]
