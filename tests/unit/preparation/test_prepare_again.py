"""The same command again: with sources that have changed, are its own files, or come late."""

import errno
import os
from pathlib import Path

import pytest
import soundfile
from filelock import FileLock
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.shar.writers import SharWriter

from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.preparation import no_speech, word_times
from nemo_mtbi.preparation.prepare import Preparation, SplitConfig
from nemo_mtbi.preparation.sources import SourceConfig
from tests.unit.preparation_helpers import config, cuts_of, text_grid, tone

pytestmark = pytest.mark.unit


def folder_of(tmp_path, count=4):
    for i in range(count):
        tone(tmp_path / "in" / f"s{i}" / f"{i}.wav").with_suffix(".txt").write_text(f"number {i}")
    return SourceConfig("folder", str(tmp_path / "in"))


def test_a_source_that_this_step_would_write_or_remove_is_refused(tmp_path):
    written = Preparation(config(tmp_path, folder_of(tmp_path))).run()
    for path in written.values():
        before = path.read_bytes()
        with pytest.raises(ConfigError, match="name that is this step's to write"):
            Preparation(config(tmp_path, SourceConfig("cuts", str(path)))).run()
        assert path.read_bytes() == before
    elsewhere = config(tmp_path / "other", SourceConfig("cuts", str(path)))
    assert cuts_of(Preparation(elsewhere).run())


def test_a_split_that_is_refused_stays_out_whatever_was_prepared_before(tmp_path):
    rows = [
        (tone(tmp_path / "in" / f"{i}.wav").name, f"number {i}", "train" if i % 2 else "test/other") for i in range(6)
    ]
    table = tmp_path / "in" / "t.tsv"
    table.write_text("\n".join(map("\t".join, [("path", "transcript", "part"), *rows])))
    assert len(cuts_of(Preparation(config(tmp_path, SourceConfig("tsv", str(table)))).run())) == 6
    named = SourceConfig("tsv", str(table), split_column="part")
    written = Preparation(config(tmp_path, named)).run()
    assert list(written) == ["train"] and len(cuts_of(written)) == 3
    report = jsonl.read_json(tmp_path / "out" / "report.json")
    assert report["skipped"] == 3 and "test/other" in next(iter(report["skipped_reasons"]))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_textgrid_that_comes_later_is_read(tmp_path, workers, monkeypatch):
    source, grids = folder_of(tmp_path, 2), tmp_path / "grids"
    text_grid(grids / "0.TextGrid", ("number", 0.1, 0.4), ("0", 0.5, 0.9))
    looked = tmp_path / "looked"
    find = Path.rglob

    def counted(self, pattern):
        if self == grids:
            with open(looked, "a") as file:
                file.write("x")
        return find(self, pattern)

    monkeypatch.setattr(word_times.Path, "rglob", counted)

    def without_times():
        looked.unlink(missing_ok=True)
        written = Preparation(config(tmp_path, source, aligner=f"textgrids:{grids}", workers=workers)).run()
        assert looked.read_text() == "x"  # once, whatever the number of workers
        return [c.id for c in cuts_of(written) if not (c.supervisions[0].alignment or {}).get("word")]

    assert without_times() == ["in-s1-1"]
    text_grid(grids / "1.TextGrid", ("number", 0.1, 0.4), ("1", 0.5, 0.9))
    assert without_times() == []


def shar_of(folder, file):
    recording = Recording.from_file(file, recording_id="r")
    own = [SupervisionSegment("a", "r", 0, recording.duration, text="hello", speaker="s")]
    folder.mkdir()
    with SharWriter(str(folder), fields={"recording": "wav"}) as writer:
        writer.write(MonoCut("a", 0, recording.duration, 0, recording=recording, supervisions=own))
    return SourceConfig("shar", str(folder))


def test_another_shar_with_the_same_ids_is_prepared_again(tmp_path):
    first = shar_of(tmp_path / "one", tone(tmp_path / "one.wav"))
    samples, rate = soundfile.read(tmp_path / "one.wav")
    soundfile.write(tmp_path / "two.wav", samples / 2, rate)
    second = shar_of(tmp_path / "two", tmp_path / "two.wav")
    loud, quiet = (abs(cuts_of(Preparation(config(tmp_path, s)).run())[0].load_audio()).max() for s in (first, second))
    assert quiet == pytest.approx(loud / 2, rel=0.01)


def test_a_full_disk_is_no_fault_of_the_recordings(tmp_path, monkeypatch):
    """libsndfile says "System error" alone; a probe of the disk says why."""
    source = shar_of(tmp_path / "one", tone(tmp_path / "one.wav"))

    def full(*_, **__):
        raise soundfile.LibsndfileError(2)

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(no_speech.soundfile, "write", full)
        patched.setattr(os, "fsync", no_room)
        with pytest.raises(DataError, match="Cannot write under.*No space left"):
            Preparation(config(tmp_path, source)).run()
    assert not list((tmp_path / "out" / "audio").iterdir())
    assert len(cuts_of(Preparation(config(tmp_path, source)).run())) == 1


def test_two_commands_on_one_folder(tmp_path):
    source = folder_of(tmp_path, 1)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "prepare.lock"), pytest.raises(DataError, match="Another command fills"):
        Preparation(config(tmp_path, source)).run()


def test_an_interrupted_end_leaves_no_manifest_of_a_split_that_is_gone(tmp_path, monkeypatch):
    source = folder_of(tmp_path, 8)
    split = SplitConfig(by="utterance", shares={"train": 0.5, "held_out": 0.5})
    assert len(Preparation(config(tmp_path, source, split=split)).run()) == 2

    def killed(*_):
        raise KeyboardInterrupt

    whole = config(tmp_path, source, split=SplitConfig(shares={"train": 1.0}))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("nemo_mtbi.preparation.prepare.Counts.tell", killed)
        Preparation(whole).run()
    Preparation(whole).run()
    assert [p.name for p in (tmp_path / "out").glob("cuts.*")] == ["cuts.train.jsonl"]


def test_broken_transcripts_have_one_reason(tmp_path):
    source = folder_of(tmp_path, 1)
    for name, text in (("a", b"caf\xe9s"), ("b", b"two\ntr\xe9s")):
        tone(tmp_path / "in" / f"{name}.wav").with_suffix(".txt").write_bytes(text)
    Preparation(config(tmp_path, source)).run()
    report = jsonl.read_json(tmp_path / "out" / "report.json")
    assert list(report["skipped_reasons"].values()) == [2]


def test_numbers_and_gaps_of_named_columns(tmp_path):
    import json

    values = [(7.0, 3.0), (7, 3), (float("nan"), float("nan")), (None, "")]
    lines = [
        json.dumps({"audio_filepath": str(tone(tmp_path / f"{i}.wav")), "text": f"word {i}", "client": c, "part": p})
        for i, (c, p) in enumerate(values)
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    source = SourceConfig("nemo", str(tmp_path / "m.jsonl"), speaker_column="client", split_column="part")
    written = Preparation(config(tmp_path, source, split=SplitConfig(shares={"train": 1.0}))).run()
    assert sorted(written) == ["3", "train"]
    assert {c.supervisions[0].speaker for c in CutSet.from_file(written["3"])} == {"7"}
    assert {c.supervisions[0].speaker for c in CutSet.from_file(written["train"])} == {None}
