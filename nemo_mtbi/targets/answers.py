"""Answers on disk, by content key: one append-only file a shard, and an index over all of them.

A line of ``<shard>.answers.jsonl`` is ``{"run": id, "answers": [record, ...]}``, written at once: complete or absent.
Engines whose answers depend on their company in a batch (bfloat16, and the last bit of float32) write whole chunks of
a fixed composition, so that a killed and continued run computes what an uninterrupted one computes, to the last bit.
"""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from nemo_mtbi.corpus.index import Record, RecordIndex
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.array_storage import FileSizes, RawChunkyReader, RawChunkyWriter, end_of
from nemo_mtbi.targets.decoder import Answer

TOP_K_FIELDS = ("top_k", "arrays", "teacher")


class AnswerFile:
    """Answers of one shard; open while a worker holds the shard. ``run`` identifies input and settings of the run."""

    def __init__(self, path: Path, top_k: int, temperature: float, run: str) -> None:
        self.path, self.top_k, self.temperature, self.run = path, top_k, temperature, run
        self.arrays_path = path.with_suffix(".bin")
        self.records: dict[str, Record] = {}
        self.appender = jsonl.Appender(path)  # repairs an incomplete last line
        sizes = FileSizes()
        for line in jsonl.read(path):
            for record in line["answers"]:
                if top_k and not whole(record, path.parent, sizes):  # would point into arrays that are appended
                    self.arrays_path = path.with_suffix(f".{uuid.uuid4().hex[:8]}.bin")
                elif usable(record, top_k, temperature) or not self.has(record["key"]):
                    self.records[record["key"]] = record
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


def whole(record: Record, folder: Path, sizes: FileSizes) -> bool:
    """Whether a record's arrays are there: a machine that dies may lose the end of one file and not of another."""
    return "teacher" not in record or max(map(end_of, record["teacher"])) <= sizes[str(folder / record["arrays"])]


def usable(record: Record, top_k: int, temperature: float) -> bool:
    """A record serves where no top-k is wanted, or this one."""
    return top_k == 0 or record.get("top_k") == [top_k, temperature]


def load_top_k(record: Record, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    reader = RawChunkyReader(folder / record["arrays"])
    return reader.read(record["teacher"][0]), reader.read(record["teacher"][1])


class AnswerIndex:
    """Where the answer to a key is, over all shards of an output folder.

    Answers of the own run are left out: whether another shard is ahead must not change what a batch is made of.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run
        self.other_runs = self._register()
        self.index = RecordIndex(folder, lambda: folder.glob("*/*.answers.jsonl"))

    def _register(self) -> bool:
        """Note this run in ``runs.json``; whether there are answers of others at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "runs.json"
        with FileLock(self.folder / "runs.lock"):
            runs = json.loads(file.read_text()) if file.is_file() else []
            if self.run not in runs:
                jsonl.write_json(file, [*runs, self.run])
        return any(r != self.run for r in runs)

    def find(self, keys: list[str], top_k: int, temperature: float) -> Iterator[tuple[Record, Path]]:
        """Records of those keys that are known, each with its folder."""
        if not self.other_runs:
            return
        for key in keys:
            found = self.index.places(key, self.run)
            usable_ones = (
                (record, folder)
                for record, folder in found
                if usable(record, top_k, temperature) and (not top_k or whole(record, folder, FileSizes()))
            )
            if (first := next(usable_ones, None)) is not None:
                yield first
