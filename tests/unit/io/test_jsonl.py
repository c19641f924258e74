"""Line files after a crash."""

import pytest

from nemo_mtbi.errors import DataError
from nemo_mtbi.io import jsonl

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("tail", [b"", b'{"key": 3', b'{"key": "' + b"x" * 200_000])
def test_jsonl_repair_drops_only_an_incomplete_last_line(tmp_path, tail):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"key": 1}\n{"key": 2}\n' + tail)
    jsonl.repair(path)
    assert [r["key"] for r in jsonl.read(path)] == [1, 2]


def test_a_journal_finds_its_lines_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text(
        '{"id": "a", "n": 1, "good": true}\n{"id": "é", "n": 2, "good": true}\n{"id": "b", "good": false}\n{"id"'
    )
    with jsonl.Journal(path, lambda record: record.get("n") if record.get("good") else None) as journal:
        assert {name: kept for name, (_, kept) in journal.places.items()} == {"a": 1, "é": 2}
        journal.write({"id": "a", "n": 3, "good": True})
        journal.write({"id": "c", "n": "ü", "good": True})
        assert journal["a"]["n"] == 3 and journal["é"]["n"] == 2 and journal["c"]["n"] == "ü"
        with pytest.raises(KeyError):
            journal["b"]
    with jsonl.Journal(path, lambda record: True) as journal:
        assert journal["a"]["n"] == 3 and set(journal.places) == {"a", "é", "b", "c"}
    with jsonl.Journal(path, lambda record: True) as one, jsonl.Journal(path, lambda record: True) as two:
        two.write({"id": "other", "n": 5})  # another process in between
        one.write({"id": "mine", "n": 6})
        two.write({"id": "third", "n": 7})
        assert one["mine"]["n"] == 6 and two["other"]["n"] == 5 and two["third"]["n"] == 7
    path.write_text("no json\n")
    with pytest.raises(DataError, match="line 1 is no JSON"):
        jsonl.Journal(path, lambda record: True)
