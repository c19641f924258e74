"""Records found by key, over files that grow, break and go."""

import json

import pytest

from nemo_mtbi.corpus import index as indexing
from nemo_mtbi.corpus.index import RecordIndex
from nemo_mtbi.errors import DataError

pytestmark = pytest.mark.unit


def index_of(folder, *more):
    return RecordIndex(folder, lambda: [*folder.glob("*.records.jsonl"), *more])


def write(path, keys, run=None, mode="a"):
    with open(path, mode) as file:
        for key in keys:
            record = {"key": key, "from": path.name}
            file.write(json.dumps(record if run is None else {"run": run, "answers": [record]}) + "\n")


def test_records_of_files_that_grow_and_of_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "LINES_TOGETHER", 2)
    folder, earlier = tmp_path / "features", tmp_path / "cuts.features.jsonl"
    folder.mkdir()
    write(folder / "0.records.jsonl", ["a", "b", "c", "d", "e"])
    write(earlier, ["z"])
    index_of(folder, earlier).open()
    write(folder / "0.records.jsonl", ["f"])
    with open(folder / "0.records.jsonl", "a") as file:
        file.write('{"key": "half')  # of a line that is being written
    found = index_of(folder, earlier)
    for key, name in (
        ("a", "0.records.jsonl"),
        ("e", "0.records.jsonl"),
        ("f", "0.records.jsonl"),
        ("z", earlier.name),
    ):
        [(record, _)] = found.places(key)
        assert record == {"key": key, "from": name}
    assert not list(found.places("half")) and not list(found.places("nothing"))
    read_only = RecordIndex(folder, lambda: ())
    assert [r["key"] for r, _ in read_only.places("c")] == ["c"]


def test_runs_are_told_apart(tmp_path):
    write(tmp_path / "0.records.jsonl", ["a"], run="one")
    write(tmp_path / "1.records.jsonl", ["a"], run="two")
    found = index_of(tmp_path)
    assert len(list(found.places("a"))) == 2
    assert [r["from"] for r, _ in found.places("a", but_run="one")] == ["1.records.jsonl"]


def test_a_file_that_is_gone_or_another_one_gives_nothing(tmp_path):
    for name in "01":
        write(tmp_path / f"{name}.records.jsonl", ["a" + name, "b" + name])
    index_of(tmp_path).open()
    (tmp_path / "0.records.jsonl").unlink()
    write(tmp_path / "1.records.jsonl", ["x" * 50], mode="w")
    stale = RecordIndex(tmp_path, lambda: ())
    assert not list(stale.places("a0")) and not list(stale.places("b1"))


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path / "0.records.jsonl", ["a"])
    place = (tmp_path / "0.records.jsonl").stat().st_size
    with open(tmp_path / "0.records.jsonl", "a") as file:
        file.write("no json\n")
    with pytest.raises(DataError, match=rf"0.records.jsonl, the line at byte {place} is no JSON .*Remove that line"):
        index_of(tmp_path).open()


@pytest.mark.parametrize("more", [0, 5])
def test_a_file_that_was_written_anew_is_read_anew(tmp_path, more):
    """Longer than before, so that its size does not say it; in the second case a line ends where it ended before."""
    file = tmp_path / "0.records.jsonl"
    write(file, ["a", "b"])
    index_of(tmp_path).open()
    write(file, ["x" * (1 + more), "y" * (1 + more), "z", "a"], mode="w")
    found = index_of(tmp_path)
    assert [len(list(found.places(key))) for key in ("x" * (1 + more), "z", "a", "b")] == [1, 1, 1, 0]
