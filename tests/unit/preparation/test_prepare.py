"""Preparation continues, splits by speaker, and says what it left out."""

import json

import pytest
from lhotse import SupervisionSegment
from lhotse.supervision import AlignmentItem
from lhotse.testing.dummies import dummy_cut

from nemo_mtbi.data.rendering import TimedWord
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.preparation.prepare import Preparation, SplitConfig
from nemo_mtbi.preparation.sources import Entry, SourceConfig
from nemo_mtbi.preparation.word_times import check_aligner, give_words
from tests.unit.preparation_helpers import config, cuts_of, tone

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


def test_another_recording_or_speaker_under_the_same_id_is_prepared_again(tmp_path):
    """Ids of a NeMo manifest are line numbers, so a removed line gives its id to the next one."""
    manifest = tmp_path / "m.jsonl"
    files = {name: tone(tmp_path / f"{name}.wav", seconds) for name, seconds in (("a", 1.0), ("b", 1.5), ("c", 2.0))}
    lines = [json.dumps({"audio_filepath": str(files[n]), "text": "yes", "speaker": n.upper()}) for n in "abc"]

    def prepared(given, **source):
        manifest.write_text("\n".join(given))
        source = SourceConfig("nemo", str(manifest), **source)
        split = SplitConfig(speakers={"A": "train", "B": "test", "C": "train"})
        cuts = cuts_of(Preparation(config(tmp_path, source, split=split)).run())
        return {(c.supervisions[0].speaker, round(c.duration, 1), c.supervisions[0].language) for c in cuts}

    assert prepared(lines) == {("A", 1.0, None), ("B", 1.5, None), ("C", 2.0, None)}
    assert prepared(lines[1:]) == {("B", 1.5, None), ("C", 2.0, None)}
    assert prepared(lines[1:], language="de") == {("B", 1.5, "de"), ("C", 2.0, "de")}
    journal = tmp_path / "out" / "prepared.jsonl"
    before = journal.read_text()
    assert prepared(lines[1:], language="de") and journal.read_text() == before
    old = [json.dumps({k: v for k, v in json.loads(line).items() if k != "of"}) for line in before.splitlines()]
    journal.write_text("\n".join(old) + "\n")  # of a version that did not say of what they are
    assert prepared(lines[1:], language="de") and journal.read_text().count("\n") == len(old)


def test_words_go_to_the_supervision_that_says_them():
    texts, words = ["hello there", "good day to you"], [TimedWord(w, i, i + 0.5) for i, w in enumerate("abcdef")]
    own = [SupervisionSegment(f"s{i}", "r", 0, 3, text=text) for i, text in enumerate(texts)]
    cut = dummy_cut(0, supervisions=own)
    cut.supervisions[0].alignment = {"word": [AlignmentItem("kept", 0.1, 0.2)]}
    give_words(cut, words)
    assert [w.symbol for w in cut.supervisions[0].alignment["word"]] == ["kept"]
    assert [w.symbol for w in cut.supervisions[1].alignment["word"]] == list("cdef")


def test_words_of_a_textgrid_go_by_time():
    """Which may have other words than the transcript."""
    words = [TimedWord(w, i, i + 0.5) for i, w in enumerate(["do", "n't", "go", "now", "please"])]
    texts = ((0, 2.6, "don't go"), (2.8, 2.2, "now please"))
    own = [SupervisionSegment(f"s{i}", "r", begin, length, text=t) for i, (begin, length, t) in enumerate(texts)]
    cut = dummy_cut(0, supervisions=own)
    give_words(cut, words)
    found = [[w.symbol for w in s.alignment["word"]] for s in cut.supervisions]
    assert found == [["do", "n't", "go"], ["now", "please"]]


@pytest.mark.parametrize(
    "name", [None, "none", "pocketsphinx", "QuartzNet15x5Base-En", "nvidia/stt_de_conformer_ctc_large"]
)
def test_names_of_aligners(name):
    check_aligner(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aligner": "pocketsfinx"}, "use pocketsphinx, none"),
        ({"aligner": "/missing/model.nemo"}, "no such file"),
        ({"split": SplitConfig(shares={"train": -0.5, "held_out": 1.5})}, "from 0 to 1"),
        ({"split": SplitConfig(shares={"train": float("nan")})}, "from 0 to 1"),
    ],
)
def test_what_cannot_work_is_said_first(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        Preparation(config(tmp_path, SourceConfig("folder", str(tmp_path)), **changes))


def test_an_output_that_is_a_file(tmp_path):
    tone(tmp_path / "in" / "a.wav").with_suffix(".txt").write_text("one")
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="Cannot write under"):
        Preparation(config(tmp_path, SourceConfig("folder", str(tmp_path / "in")))).run()


def test_a_split_that_got_nothing_is_said(tmp_path, caplog):
    for i in range(6):
        tone(tmp_path / "in" / "me" / f"{i}.wav").with_suffix(".txt").write_text(f"number {i}")
    source = SourceConfig("folder", str(tmp_path / "in"))
    shares = {"train": 0.8, "validation": 0.1, "held_out": 0.1}
    written = Preparation(config(tmp_path, source, split=SplitConfig(shares=shares))).run()
    assert len(written) == 1 and "With split.by=utterance" in caplog.text
    caplog.clear()
    Preparation(config(tmp_path / "b", source, split=SplitConfig("utterance", {"train": 0.5, "held_out": 0.5}))).run()
    assert "split.by" not in caplog.text
