"""Preparation continues, splits by speaker, and says what it left out."""

import pytest

from nemo_mtbi.errors import DataError
from nemo_mtbi.preparation.prepare import Preparation, SplitConfig
from nemo_mtbi.preparation.sources import Entry, SourceConfig
from tests.unit.preparation_helpers import config, tone

pytestmark = pytest.mark.unit


def test_a_killed_run_continues_and_changed_settings_start_over(tmp_path):
    for i in range(4):
        tone(tmp_path / "in" / f"{i}.wav").with_suffix(".txt").write_text(f"number {i}")
    make = lambda **kw: Preparation(config(tmp_path, SourceConfig("folder", str(tmp_path / "in")), **kw))  # noqa: E731
    written = make().run()
    complete = {p: p.read_text() for p in written.values()}
    progress = tmp_path / "out" / "prepared.jsonl"
    lines = progress.read_text().splitlines(keepends=True)
    progress.write_text("".join(lines[:2]) + lines[2][:20])  # killed in the middle of the third line
    for path in written.values():
        path.unlink()
    assert {p: p.read_text() for p in make().run().values()} == complete
    assert len(progress.read_text().splitlines()) == 4
    make(min_seconds=0.3).run()
    assert len(progress.read_text().splitlines()) == 8


def test_speakers_are_in_one_split_only():
    split = SplitConfig(shares={"train": 0.7, "held_out": 0.3}, speakers={"vip": "test"})
    entries = [Entry(f"{s}-{i}", lambda: None, f"speaker{s}") for s in range(60) for i in range(3)]
    by_speaker = {}
    for entry in entries:
        by_speaker.setdefault(entry.speaker, set()).add(split.assign(entry))
    assert all(len(v) == 1 for v in by_speaker.values())
    held_out = sum(v == {"held_out"} for v in by_speaker.values())
    assert 8 <= held_out <= 28
    assert split.assign(Entry("x", lambda: None, "vip")) == "test"


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_text("no audio")
    (tmp_path / "in" / "a.txt").write_text("words")
    with pytest.raises(DataError, match="No utterance is left.*unreadable"):
        Preparation(config(tmp_path, SourceConfig("folder", str(tmp_path / "in")))).run()
