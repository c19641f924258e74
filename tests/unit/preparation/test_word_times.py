"""Word times: NeMo, PocketSphinx, TextGrids."""

from pathlib import Path

import numpy as np
import pytest
from lhotse.testing.dummies import dummy_cut, dummy_recording

from nemo_mtbi.data.rendering import TimedWord, match_words
from nemo_mtbi.errors import DataError
from nemo_mtbi.preparation.prepare import Preparation
from nemo_mtbi.preparation.sources import SourceConfig
from nemo_mtbi.preparation.word_times import (
    NeMoCTCAligner,
    PocketSphinxAligner,
    TextGrids,
    Unalignable,
    build_aligner,
)
from tests.unit.preparation_helpers import config, cuts_of, text_grid, tone

pytestmark = pytest.mark.unit


def test_nemo_forced_alignment_gives_times_for_every_word(nemo_asr):
    aligner = build_aligner(nemo_asr)
    assert isinstance(aligner, NeMoCTCAligner)
    samples = (0.1 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    words = aligner.align(samples, "one two three")
    assert [w.text for w in words] == ["one", "two", "three"]
    times = [t for w in words for t in (w.start_seconds, w.end_seconds)]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= 2.1
    with pytest.raises(Unalignable):
        aligner.align(samples[:1600], "one two three four five six seven eight nine ten eleven twelve")


def test_pocketsphinx_says_why_it_cannot_align():
    aligner = PocketSphinxAligner()
    with pytest.raises(Unalignable, match="dictionary"):
        aligner.align(np.zeros(16000, np.float32), "xqzzy brrtl")
    with pytest.raises(Unalignable):
        aligner.align(
            np.zeros(800, np.float32), "a sentence that is far too long for so little audio, as anyone can see"
        )


def test_textgrids(tmp_path):
    tone(tmp_path / "in" / "a.wav", 2.0).with_suffix(".txt").write_text("Hello, world")
    grid = text_grid(tmp_path / "grids" / "a.TextGrid", ("hello", 0.4, 0.9), ("world", 1.0, 1.6))
    written = Preparation(
        config(tmp_path, SourceConfig("folder", str(tmp_path / "in")), aligner=f"textgrids:{grid.parent}")
    ).run()
    items = cuts_of(written)[0].supervisions[0].alignment["word"]
    assert [(i.symbol, i.start, round(i.end, 3)) for i in items] == [("hello", 0.4, 0.9), ("world", 1.0, 1.6)]


def test_match_words_on_empty_alignment():
    assert [w.start_seconds for w in match_words(["a", "b"], ())] == [None, None]


def test_textgrids_are_found_by_name_whatever_it_holds(tmp_path, monkeypatch):
    folder = tmp_path / "grids" / "s1"
    text_grid(folder / "rec [1].TextGrid", ("hello", 0, 0.4), ("", 0.4, 0.5), ("there", 0.5, 0.9))
    text_grid(folder / "long.TextGrid", ("hello", 0, 1000))
    text_grid(folder / "none.TextGrid")
    text_grid(folder / "marks.TextGrid", ('"hi"', 1e-05, 0.4), ('5"', 0.4, 0.9), tier="1272 - words")
    (folder / "utf16.TextGrid").write_bytes((folder / "rec [1].TextGrid").read_text().encode("utf-16"))
    (folder / "broken.TextGrid").write_text((folder / "rec [1].TextGrid").read_text().replace("0.4", "0.4.1"))
    (folder / "half.TextGrid").write_text((folder / "rec [1].TextGrid").read_text()[:150])
    grids = TextGrids(tmp_path / "grids")

    def words(name):
        return [w.text for w in grids.words(dummy_cut(0, recording=dummy_recording(0)).with_id(name))]

    assert words("rec [1]") == words("s1/rec [1]") == words("utf16") == ["hello", "there"]
    assert words("marks") == ['"hi"', '5"']  # of one of several speakers, with marks within the text
    for name in ("broken", "half"):
        with pytest.raises(Unalignable, match=r"no TextGrid \("):
            words(name)
    monkeypatch.setattr(Path, "rglob", None)  # looked through once
    assert words("rec [1]") == ["hello", "there"]
    for name, message in (("long", "beyond the audio"), ("none", "without words"), ("a**b", "no TextGrid")):
        with pytest.raises(Unalignable, match=message):
            words(name)
    with pytest.raises(DataError, match="not a folder"):
        TextGrids(tmp_path / "absent")


def test_words_of_other_scripts_get_their_own_times():
    own = match_words(["राम", "का", "की"], (TimedWord("राम", 0.0, 1.0), TimedWord("की", 2.0, 3.0)))
    assert [w.start_seconds for w in own] == [0.0, None, 2.0]
    own = match_words(["caf\u00e9,", "It\u2019s"], (TimedWord("cafe\u0301", 0.0, 1.0), TimedWord("its", 1.0, 2.0)))
    assert [w.start_seconds for w in own] == [0.0, 1.0]
