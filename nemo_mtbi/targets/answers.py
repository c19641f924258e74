"""Answers on disk, by content key: one append-only file a shard, and an index over all of them.

A line of ``<shard>.answers.jsonl`` is ``{"run": id, "answers": [record, ...]}``, written at once: complete or absent.
Engines whose answers depend on their company in a batch (bfloat16, and the last bit of float32) write whole chunks of
a fixed composition, so that a killed and continued run computes what an uninterrupted one computes, to the last bit.
"""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from nemo_mtbi.io import jsonl
from nemo_mtbi.io.array_storage import RawChunkyReader, RawChunkyWriter
from nemo_mtbi.targets.decoder import Answer

Record = dict[str, Any]
TOP_K_FIELDS = ("top_k", "arrays", "teacher")


class AnswerFile:
    """Answers of one shard; open while a worker holds the shard. ``run`` identifies input and settings of the run."""

    def __init__(self, path: Path, top_k: int, temperature: float, run: str) -> None:
        self.path, self.top_k, self.temperature, self.run = path, top_k, temperature, run
        self.arrays_path = path.with_suffix(".bin")
        self.records: dict[str, Record] = {}
        self.appender = jsonl.Appender(path)  # repairs an incomplete last line
        for line in jsonl.read(path):
            self.records.update((r["key"], r) for r in line["answers"])
        self.arrays = RawChunkyWriter(self.arrays_path) if top_k else None

    def has(self, key: str) -> bool:
        """There is an answer, with the teacher's top-k if that is wanted."""
        record = self.records.get(key)
        return record is not None and usable(record, self.top_k, self.temperature)

    def add(self, answers: list[tuple[Answer, str]]) -> None:
        """Append answers with their decoded texts, as one line."""
        self._append([self._record(answer, text) for answer, text in answers])

    def copy(self, records: list[tuple[Record, Path]]) -> None:
        """Append records of another answer file, top-k included."""
        copied = []
        for source, folder in records:
            record = {k: v for k, v in source.items() if k not in TOP_K_FIELDS}  # its arrays stay where they are
            if self.arrays is not None:
                record |= self._top_k_fields(*load_top_k(source, folder))
            copied.append(record)
        if copied:
            self._append(copied)

    def top_k_of(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, k) ids and log-probabilities of one answer."""
        return load_top_k(self.records[key], self.path.parent)

    def _append(self, records: list[Record]) -> None:
        if self.arrays is not None:
            self.arrays.flush()
        self.appender.write({"run": self.run, "answers": records})
        self.records.update((r["key"], r) for r in records)

    def _record(self, answer: Answer, text: str) -> Record:
        record: Record = {
            "key": answer.key,
            "response_ids": answer.response_ids,
            "finished": answer.finished,
            "response": text,
        }
        if self.arrays is not None and answer.top_ids is not None and answer.top_log_probs is not None:
            record |= self._top_k_fields(answer.top_ids, answer.top_log_probs)
        return record

    def _top_k_fields(self, ids: Any, log_probs: Any) -> Record:
        """Write (tokens, k) arrays; the fields that point to them."""
        assert self.arrays is not None
        return {
            "top_k": [self.top_k, self.temperature],
            "arrays": self.arrays_path.name,
            "teacher": [self.arrays.write("", ids), self.arrays.write("", log_probs)],
        }

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.appender.file.close()
        if self.arrays is not None:
            self.arrays.close()


def usable(record: Record, top_k: int, temperature: float) -> bool:
    """A record serves where no top-k is wanted, or this one."""
    return top_k == 0 or record.get("top_k") == [top_k, temperature]


def load_top_k(record: Record, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    reader = RawChunkyReader(folder / record["arrays"])
    return reader.read(record["teacher"][0]), reader.read(record["teacher"][1])


class AnswerIndex:
    """Where the answer to a key is, over all shards of an output folder; finds answers again when cuts move between
    shards.

    An SQLite file that one process at a time brings up to date (only bytes that it has not seen) and any number read.
    Answers of the own run are left out: whether another shard is ahead must not change what a batch is made of.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run
        self.other_runs = self._register()
        self._read: tuple[str, int, dict[str, Record]] | None = None  # the last line: neighbours are asked for together
        self.connection: sqlite3.Connection | None = None

    def _register(self) -> bool:
        """Note this run in ``runs.json``; whether there are answers of others at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "runs.json"
        with FileLock(self.folder / "runs.lock"):
            runs = json.loads(file.read_text()) if file.is_file() else []
            if self.run not in runs:
                jsonl.write_json(file, [*runs, self.run])
        return any(r != self.run for r in runs)

    def _open(self) -> sqlite3.Connection:
        """The index, brought up to date; made when an answer is first looked for."""
        if self.connection is None:
            with FileLock(self.folder / "index.lock"):
                self.connection = sqlite3.connect(self.folder / "index.sqlite", timeout=3600)
                self.connection.execute("create table if not exists files (path text primary key, size integer)")
                self.connection.execute(
                    "create table if not exists answers (key text, path text, offset integer, run text)"
                )
                self.connection.execute("create index if not exists by_key on answers (key)")
                for file in sorted(self.folder.glob("*/*.answers.jsonl")):
                    self._update(file)
                    self.connection.commit()
        return self.connection

    def _update(self, file: Path) -> None:
        assert self.connection is not None
        name, size = str(file.relative_to(self.folder)), file.stat().st_size
        row = self.connection.execute("select size from files where path = ?", (name,)).fetchone()
        seen = row[0] if row else 0
        if size == seen:
            return
        if size < seen:
            self.connection.execute("delete from answers where path = ?", (name,))
            seen = 0
        rows = []
        with open(file, "rb") as stream:
            offset = stream.seek(seen)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                content = json.loads(line)
                rows += [(r["key"], name, offset, content["run"]) for r in content["answers"]]
                offset += len(line)
        self.connection.executemany("insert into answers values (?, ?, ?, ?)", rows)
        self.connection.execute("insert or replace into files values (?, ?)", (name, offset))

    def find(self, keys: list[str], top_k: int, temperature: float) -> Iterator[tuple[Record, Path]]:
        """Records of those keys that are known, each with its folder."""
        if not self.other_runs:
            return
        connection = self._open()
        for key in keys:
            places = connection.execute("select path, offset from answers where key = ? and run != ?", (key, self.run))
            for name, offset in places:
                if not (self.folder / name).is_file():
                    continue
                record = self._line(name, offset).get(key)
                if record is not None and usable(record, top_k, temperature):
                    yield record, (self.folder / name).parent
                    break

    def _line(self, name: str, offset: int) -> dict[str, Record]:
        if self._read is None or self._read[:2] != (name, offset):
            with open(self.folder / name, "rb") as stream:
                stream.seek(offset)
                answers = json.loads(stream.readline())["answers"]
            self._read = (name, offset, {r["key"]: r for r in answers})
        return self._read[2]
