"""Each rank reads its own lines of a manifest: together all, no line twice, in the same order again and again."""

import gzip
import json
import os
from itertools import chain
from pathlib import Path

import pytest
from lhotse import CutSet, MonoCut

from nemo_mtbi.data.cut_lines import Share, line_starts
from nemo_mtbi.errors import DataError

pytestmark = pytest.mark.unit


def written(path, ids, end="\n"):
    lines = [json.dumps(MonoCut(name, 0.0, 1.0, 0).to_dict(), ensure_ascii=False) for name in ids]
    path.write_bytes((end.join(lines) + end).encode())
    return path


def starts_of(path):
    with open(path, "rb") as file:
        return line_starts(path, file)[2:]


def visits(path, size, seed, number=0):
    cuts = CutSet.from_file(path)
    return [[c.id for c in Share(cuts, str(path), rank, size, seed).visit(number)] for rank in range(size)]


IDS = [f"utt{i}" for i in range(23)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_share_the_lines(tmp_path, size, end):
    path = written(tmp_path / "cuts.jsonl", [*IDS, "señor ü", "\u2028line"], end)
    shares = visits(path, size, 7)
    assert sorted(chain(*shares)) == sorted([*IDS, "señor ü", "\u2028line"])
    if end != "\n\n":  # empty lines count as lines
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert visits(path, size, 7) == shares  # now by the kept places
    assert visits(path, size, 7, 1) != shares and visits(path, size, 8) != shares


def test_lines_of_a_batch_go_together(tmp_path):
    path = written(tmp_path / "cuts.jsonl", IDS)
    cuts = CutSet.from_file(path)
    shares = [[c.id for c in Share(cuts, str(path), rank, 2, dealt=4).visit(0)] for rank in range(2)]
    assert shares[0] == [*IDS[:4], *IDS[8:12], *IDS[16:20]] and shares[1] == [*IDS[4:8], *IDS[12:16], *IDS[20:]]
    few = [[c.id for c in Share(cuts, str(path), rank, 8, dealt=4).visit(0)] for rank in range(8)]
    assert sorted(chain(*few)) == sorted(IDS) and min(map(len, few)) == 2  # no rank is left without


def test_without_a_seed_lines_keep_their_order(tmp_path):
    path = written(tmp_path / "cuts.jsonl", IDS)
    assert visits(path, 3, None) == [IDS[0::3], IDS[1::3], IDS[2::3]]
    assert visits(path, 3, None, 1) == [IDS[1::3], IDS[2::3], IDS[0::3]]
    assert visits(path, 1, None) == [IDS]


def test_fewer_lines_than_ranks(tmp_path):
    shares = visits(written(tmp_path / "cuts.jsonl", IDS[:3]), 5, 7)
    assert all(sorted(share) == sorted(IDS[:3]) for share in shares) and len({share[0] for share in shares}) == 3


def test_other_sources_are_read_through(tmp_path):
    plain = written(tmp_path / "cuts.jsonl", IDS)
    packed = tmp_path / "cuts.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert visits(packed, 3, 7) == [IDS[0::3], IDS[1::3], IDS[2::3]]
    assert visits(packed, 3, 7, 1) == [IDS[1::3], IDS[2::3], IDS[0::3]]  # no rank sees the same third for ever


def test_places_are_found_again_after_a_change(tmp_path):
    path = written(tmp_path / "cuts.jsonl", IDS)
    first = starts_of(path)
    written(path, [*IDS, "one more"])
    assert len(starts_of(path)) == len(first) + 1
    same_size = path.read_bytes().replace(b"utt1\x22", b"utt\n\x22")
    path.write_bytes(same_size)
    os.utime(path, ns=(0, 10**9))  # a copy may be older than what it replaces
    assert len(starts_of(path)) == len(first) + 2


def test_a_manifest_that_is_replaced_between_visits(tmp_path):
    path = written(tmp_path / "cuts.jsonl", IDS)
    share = Share(CutSet.from_file(path), str(path), 0, 2, 7)
    assert len(list(share.visit(0))) == 12
    written(tmp_path / "other.jsonl", ["a longer name", *IDS]).replace(path)
    assert len(list(share.visit(1))) == 12 and {
        c.id for r in range(2) for c in Share(CutSet.from_file(path), str(path), r, 2, 7).visit(1)
    } == {"a longer name", *IDS}


@pytest.mark.parametrize("broken", [b"", b"\x93NUMPY", b"no array"])
def test_half_written_places_are_found_again(tmp_path, broken):
    path = written(tmp_path / "cuts.jsonl", IDS)
    expected = starts_of(path).tolist()
    path.with_name(".cuts.jsonl.lines.npy").write_bytes(broken)
    assert starts_of(path).tolist() == expected


def test_a_folder_that_can_only_be_read(tmp_path, monkeypatch):
    path = written(tmp_path / "cuts.jsonl", IDS)

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("nemo_mtbi.data.cut_lines.np.save", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    assert len(starts_of(path)) == len(IDS) + 1
    monkeypatch.undo()
    for left in tmp_path.glob(".cuts*"):
        left.unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["cuts.jsonl"]


def test_a_broken_line_is_named(tmp_path):
    path = written(tmp_path / "cuts.jsonl", IDS)
    path.write_text(path.read_text().replace('"utt4"', '"utt4'))
    with pytest.raises(DataError, match=r"cuts.jsonl, line 5 is no JSON"):
        visits(path, 1, 7)


def test_an_unfinished_last_line_is_named(tmp_path):
    path = written(tmp_path / "cuts.jsonl", IDS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="line 23 is no JSON"):
        visits(path, 2, None)


def test_an_empty_manifest(tmp_path):
    (tmp_path / "cuts.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        starts_of(tmp_path / "cuts.jsonl")
