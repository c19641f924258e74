"""Recordings that were written to a pipe, other languages and scripts, and what corpora keep under our names."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

import nemo_mtbi
from nemo_mtbi.data.alignments import utterances
from nemo_mtbi.data.audio import load_waveform
from nemo_mtbi.data.audio_length import TOTAL_SAMPLES
from nemo_mtbi.data.target import is_no_speech
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.preparation.prepare import Preparation, SplitConfig
from nemo_mtbi.preparation.sources import SourceConfig
from nemo_mtbi.preparation.word_times import (
    NeMoCTCAligner,
    PocketSphinxAligner,
    SpeakersWord,
    TextGrids,
    Unalignable,
    build_aligner,
    give_words,
)
from tests.unit.preparation_helpers import config, cuts_of, text_grid, tone

pytestmark = pytest.mark.unit
SAMPLES = Path(nemo_mtbi.__file__).parent / "samples" / "librispeech"
SPEECH = ["1272-128104-0000.mp3", "1272-135031-0005.mp3", "1272-135031-0006.mp3"]


def transcripts():
    rows = (SAMPLES / "transcripts.tsv").read_text().splitlines()[1:]
    return {row.split("\t")[0]: row.split("\t")[1] for row in rows}


def report(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())


def piped(samples, format):
    """What a program writes that cannot go back to fill in the length."""
    file = io.BytesIO()
    of_mp3 = {"subtype": "MPEG_LAYER_III", "bitrate_mode": "VARIABLE", "compression_level": 0.5}
    soundfile.write(file, samples, 16000, format=format, **(of_mp3 if format == "MP3" else {}))
    data = bytearray(file.getvalue())
    if format == "FLAC":
        field = int.from_bytes(data[TOTAL_SAMPLES]) >> 36 << 36
        data[TOTAL_SAMPLES] = field.to_bytes(8)
    elif format == "WAV":
        at = data.find(b"data") + 4
        data[at : at + 4] = bytes(4)
    else:
        data = data[data.index(data[:2], 40) :]  # from the second frame on
        assert b"Xing" not in data
    return bytes(data)


@pytest.mark.parametrize("format", ["FLAC", "WAV", "MP3"])
def test_recordings_of_a_pipe_are_prepared_whole(tmp_path, format):
    quiet = 1e-3 * np.random.default_rng(0).standard_normal(16000 * 4)
    samples = np.concatenate([quiet, 0.3 * np.random.default_rng(1).standard_normal(16000 * 6)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.{format.lower()}").write_bytes(piped(samples, format))
    (tmp_path / "in" / "a.txt").write_text("one two three")
    (cut,) = cuts_of(Preparation(config(tmp_path, SourceConfig("folder", str(tmp_path / "in")))).run())
    assert cut.duration == pytest.approx(10, abs=0.1) and cut.supervisions[0].duration == cut.duration
    assert cut.load_audio().shape[1] == cut.num_samples
    assert Path(cut.recording.sources[0].source).is_file()


def test_times_do_not_depend_on_what_was_aligned_before():
    texts = transcripts()
    audios = {name: load_waveform(SAMPLES / name, 16000) for name in SPEECH}
    alone = {name: PocketSphinxAligner().align(audios[name], texts[name]) for name in SPEECH}
    one = PocketSphinxAligner()
    for name in (*SPEECH, *reversed(SPEECH)):
        assert one.align(audios[name], texts[name]) == alone[name]


def test_pocketsphinx_is_not_asked_about_other_languages(tmp_path):
    for name, language in (("a", "en"), ("b", "es"), ("c", "English")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / SPEECH[0]).symlink_to(SAMPLES / SPEECH[0])
        (folder / SPEECH[0]).with_suffix(".txt").write_text(transcripts()[SPEECH[0]])
        source = SourceConfig("folder", str(folder), language=language)
        (cut,) = cuts_of(Preparation(config(tmp_path / name, source, aligner="pocketsphinx")).run())
        assert bool((cut.supervisions[0].alignment or {}).get("word")) is (language != "es")


def test_nemo_leaves_out_what_its_vocabulary_cannot_write(nemo_asr):
    aligner = build_aligner(nemo_asr)
    assert isinstance(aligner, NeMoCTCAligner)
    samples = (0.1 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    plain = aligner.align(samples, "one two three")
    shouted = aligner.align(samples, "ONE, two! 25 three...")
    assert [w.text for w in shouted] == ["ONE,", "two!", "25", "three..."]
    assert [(w.start_seconds, w.end_seconds) for w in shouted if w.text != "25"] == [
        (w.start_seconds, w.end_seconds) for w in plain
    ]
    assert shouted[2].start_seconds is None
    for text in ("привет мир", "1 2 3 one"):
        with pytest.raises(Unalignable, match="vocabulary"):
            aligner.align(samples, text)
    aligner.rate = 8000  # what the model was trained at
    assert aligner.align(samples, "one two three")[-1].end_seconds <= 1.1


def conversation(*supervisions, **custom):
    recording = Recording.from_file(SAMPLES / SPEECH[0])
    own = [
        SupervisionSegment(f"s{i}", recording.id, begin, length, text=text, speaker=speaker)
        for i, (begin, length, text, speaker) in enumerate(supervisions)
    ]
    return MonoCut("a", 0, recording.duration, 0, recording=recording, supervisions=own, custom=custom or None)


@pytest.mark.parametrize("tiers", [("ann", "bob"), ("x", "y")])
def test_people_who_talk_at_once_keep_their_own_words(tmp_path, tiers):
    from textgrid import TextGrid

    grids = []
    for name, words in zip(
        tiers, ([("yes", 0.5, 0.9), ("yes", 3.5, 3.9)], [("yes", 2.5, 2.9), ("but", 3.6, 4)]), strict=True
    ):
        grids.append(
            TextGrid.fromFile(str(text_grid(tmp_path / "g" / f"{name}.TextGrid", *words, tier=f"{name} - words")))
        )
    together = TextGrid(maxTime=4.5)
    for grid in grids:
        together.append(grid[0])
    (tmp_path / "grids").mkdir()
    together.write(str(tmp_path / "grids" / "a.TextGrid"))
    cut = conversation((0.0, 4.0, "yes yes", "ann"), (2.0, 2.2, "yes but", "bob"))
    if tiers == ("x", "y"):
        with pytest.raises(Unalignable, match="at once"):
            TextGrids(tmp_path / "grids").words(cut)
        return
    give_words(cut, TextGrids(tmp_path / "grids").words(cut))
    found = [[(w.symbol, w.start) for w in s.alignment["word"]] for s in cut.supervisions]
    assert found == [[("yes", 0.5), ("yes", 3.5)], [("yes", 2.5), ("but", 3.6)]]


def test_a_speakers_words_go_to_the_nearest_utterance():
    cut = conversation((0.0, 1.0, "a", "ann"), (2.0, 1.0, "b c", "ann"))
    give_words(cut, [SpeakersWord(w, t, t + 0.1, "ann") for w, t in (("a", 0.5), ("b", 1.7), ("c", 2.5))])
    assert [[w.symbol for w in s.alignment["word"]] for s in cut.supervisions] == [["a"], ["b", "c"]]


def test_silences_among_words_are_none():
    cut = conversation((0.0, 3.0, "he was", "ann"))
    items = [AlignmentItem(w, t, 0.4) for w, t in (("", 0.0), ("he", 0.4), (" ", 0.8), ("was", 1.2), ("", 1.6))]
    cut.supervisions[0].alignment = {"word": items}
    ((_, words),) = utterances(cut)
    assert [w.text for w in words] == ["he", "was"]


@pytest.mark.parametrize("text", ["", None])
def test_segments_without_text_need_no_word_times(tmp_path, text):
    cut = conversation((0.0, 1.0, "hello", "ann"), (2.0, 1.0, text, None))
    cut.supervisions[0].alignment = {"word": [AlignmentItem("hello", 0.1, 0.5)]}
    CutSet([cut]).to_file(tmp_path / "in.jsonl")
    source = SourceConfig("cuts", str(tmp_path / "in.jsonl"), language="de")
    (found,) = cuts_of(Preparation(config(tmp_path, source, unaligned="skip")).run())
    assert [s.language for s in found.supervisions] == ["de", "de"]


def test_recordings_without_speech_stay_when_they_are_prepared_again(tmp_path):
    cut = conversation((0.0, 1.0, "", None), no_speech=True)
    CutSet([cut]).to_file(tmp_path / "in.jsonl")
    (found,) = cuts_of(Preparation(config(tmp_path, SourceConfig("cuts", str(tmp_path / "in.jsonl")))).run())
    assert is_no_speech(found)
    assert not is_no_speech(conversation((0.0, 1.0, "hello", None), no_speech=0.02))  # a probability of others


def test_fields_of_a_nemo_manifest_name_split_and_speaker(tmp_path):
    lines = [
        {
            "audio_filepath": str(tone(tmp_path / f"{i}.wav")),
            "duration": 1.0,
            "text": f"number {i}",
            "split": split,
            "spk": f"p{i}",
        }
        for i, split in enumerate(["train", "test", "train", "test"])
    ]
    (tmp_path / "m.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceConfig("nemo", str(tmp_path / "m.json"), split_column="split", speaker_column="spk")
    written = Preparation(config(tmp_path, source)).run()
    found = {name: [c.supervisions[0].speaker for c in CutSet.from_file(path)] for name, path in written.items()}
    assert found["train"] == ["p0", "p2"] and found["test"] == ["p1", "p3"]


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"kind": "cuts", "audio_root": "x"}, "audio_root"),
        ({"kind": "shar", "metadata": ["gender"]}, "metadata"),
        ({"kind": "nemo", "text_column": "norm"}, "text_column"),
        ({"kind": "folder", "speaker_column": "spk"}, "speaker_column"),
        ({"kind": "lhotse_recipe", "name": "yesno", "split_column": "split"}, "split_column"),
        ({"kind": "tsv", "options": {"a": 1}}, "options"),
    ],
)
def test_keys_that_a_source_does_not_look_at_are_refused(tmp_path, source, key):
    with pytest.raises(ConfigError, match=f"kind {source['kind']} has no {key}"):
        Preparation(config(tmp_path, SourceConfig(path="x", **source)))


def test_what_is_too_much_for_its_time_in_scripts_without_spaces(tmp_path):
    for name, text in (("a", "我们今天去公园吃饭好不好呢" * 20), ("b", "我们今天去公园吃饭")):
        tone(tmp_path / "in" / f"{name}.wav", 2.0).with_suffix(".txt").write_text(text)
    found = cuts_of(
        Preparation(
            config(tmp_path, SourceConfig("folder", str(tmp_path / "in")), split=SplitConfig(by="utterance"))
        ).run()
    )
    assert [c.supervisions[0].text for c in found] == ["我们今天去公园吃饭"]
    assert any("words a second" in why for why in report(tmp_path)["skipped_reasons"])
