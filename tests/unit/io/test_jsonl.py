"""Line files after a crash."""

import pytest

from nemo_mtbi.io import jsonl

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("tail", [b"", b'{"key": 3', b'{"key": "' + b"x" * 200_000])
def test_jsonl_repair_drops_only_an_incomplete_last_line(tmp_path, tail):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"key": 1}\n{"key": 2}\n' + tail)
    jsonl.repair(path)
    assert [r["key"] for r in jsonl.read(path)] == [1, 2]
