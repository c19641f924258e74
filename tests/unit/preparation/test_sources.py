"""Where utterances come from."""

import json
import wave

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig, SplitConfig
from nemo_mtbi.preparation.sources import SourceConfig, read_tsv
from tests.unit.preparation_helpers import config, cuts_of, tone

pytestmark = pytest.mark.unit


def report(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_tsv_with_every_kind_of_bad_audio(tmp_path):
    tone(tmp_path / "good.wav")
    tone(tmp_path / "stereo_8k.wav", rate=8000, channels=2)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is no audio")
    with wave.open(str(tmp_path / "zero.wav"), "wb") as out:
        out.setnchannels(1), out.setsampwidth(2), out.setframerate(16000)
    tone(tmp_path / "long_text.wav", 0.5)
    rows = [(f"{n}.wav", "two words") for n in ("good", "stereo_8k", "empty", "text", "zero", "absent")]
    rows += [("good.wav", ""), ("long_text.wav", "a b c d e f g h i")]
    table = tmp_path / "t.tsv"
    lines = [f"{a}\t{t}\tspk{i}" for i, (a, t) in enumerate(rows)]
    lines[6] = "other.wav\t\tspk6"
    table.write_text("path\ttranscript\tspeaker\n" + "\n".join(lines) + "\n")
    written = Preparation(config(tmp_path, SourceConfig("tsv", str(table)))).run()
    kept = {c.id.rsplit("-", 1)[-1]: c for c in cuts_of(written)}
    assert set(kept) == {"good", "stereo_8k"}
    assert kept["stereo_8k"].sampling_rate == 8000
    reasons = report(tmp_path)["skipped_reasons"]
    assert report(tmp_path)["skipped"] == 6
    assert (
        sum(n for r, n in reasons.items() if r.startswith("unreadable audio"))
        + sum(n for r, n in reasons.items() if r.startswith("duration"))
        == 4
    )
    assert reasons["empty transcript"] == 1
    assert any("words a second" in r for r in reasons)


def test_nemo_manifest_with_offsets(tmp_path):
    tone(tmp_path / "a.wav", 3.0)
    rows = [
        {"audio_filepath": "a.wav", "text": "one", "duration": 1.0, "offset": 1.5, "speaker": "s"},
        {"audio_filepath": "a.wav", "text": "two", "duration": 9.0, "offset": 0},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    cut = cuts_of(Preparation(config(tmp_path, SourceConfig("nemo", str(manifest)))).run())[0]
    assert (cut.start, cut.duration, cut.supervisions[0].text) == (1.5, 1.0, "one")
    assert "but the audio lasts 3.00 s" in next(iter(report(tmp_path)["skipped_reasons"]))


def test_folder_and_cuts(tmp_path):
    for name in ("ann/x", "bob/y"):
        tone(tmp_path / "in" / f"{name}.wav").with_suffix(".txt").write_text("hello there")
    written = Preparation(config(tmp_path, SourceConfig("folder", str(tmp_path / "in")))).run()
    first = cuts_of(written)
    assert {c.supervisions[0].speaker for c in first} == {"ann", "bob"}
    again = PrepareConfig(
        str(tmp_path / "second"), [SourceConfig("cuts", str(p)) for p in written.values()], aligner="none"
    )
    assert {c.id for c in cuts_of(Preparation(again).run())} == {c.id for c in first}
    shar = tmp_path / "shar"
    shar.mkdir()
    CutSet(first).to_shar(shar, {"recording": "flac"})
    third = PrepareConfig(str(tmp_path / "third"), [SourceConfig("shar", str(shar))], aligner="none")
    assert {c.id for c in cuts_of(Preparation(third).run())} == {c.id for c in first}


@pytest.mark.parametrize(
    "source, message",
    [
        (SourceConfig("tsv", "absent.tsv"), "does not exist"),
        (SourceConfig("wavs", "x"), "Unknown source kind"),
        (SourceConfig("lhotse_recipe", ".", "no_such_corpus"), "no recipe"),
        (SourceConfig("sentences", None, options={"voices": ["espeak:x"]}), "engines are"),
        (SourceConfig("sentences", None, options={"voice": "x"}), "options"),
    ],
)
def test_bad_sources_are_refused(tmp_path, source, message):
    with pytest.raises((ConfigError, DataError), match=message):
        Preparation(config(tmp_path, source)).run()


def test_empty_and_broken_manifests(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for kind in ("nemo", "cuts"):
        with pytest.raises(DataError, match="is empty"):
            Preparation(config(tmp_path, SourceConfig(kind, str(empty)))).run()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"audio_filepath": "a.wav"}\n')
    with pytest.raises(DataError, match="line 1.*text"):
        Preparation(config(tmp_path, SourceConfig("nemo", str(broken)))).run()
    table = tmp_path / "t.tsv"
    table.write_text("file\ttext\nx\ty\n")
    with pytest.raises(DataError, match="no column"):
        Preparation(config(tmp_path, SourceConfig("tsv", str(table)))).run()


def test_lhotse_recipe(tmp_path):
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121123"
    chapter.mkdir(parents=True)
    soundfile.write(chapter / "84-121123-0000.flac", 0.1 * np.ones(16000), 16000)
    (chapter / "84-121123-0000.txt").write_text("")
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n")
    source = SourceConfig(
        "lhotse_recipe", str(tmp_path / "LibriSpeech"), "librispeech", options={"dataset_parts": "dev-clean"}
    )
    cut = cuts_of(Preparation(config(tmp_path, source)).run())[0]
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("GO DO YOU HEAR", "84")


def test_sentences_with_speed_and_noise(tmp_path):
    pytest.importorskip("py_nanotts")
    (tmp_path / "s.txt").write_text("Open the window.\nWhere is my hat?\nTwo eggs, please.\n")
    options = {
        "voices": ["pico:en-US"],
        "unseen_voices": ["pico:en-GB"],
        "held_out": 1,
        "speeds": [1.25],
        "snr_db": [5.0],
    }
    source = SourceConfig("sentences", str(tmp_path / "s.txt"), options=options)
    written = Preparation(config(tmp_path, source, aligner="pocketsphinx")).run()
    assert set(written) == {"train", "held_out", "unseen_voice"}
    cut = cuts_of(written)[0]
    assert cut.id.endswith("-sp1.25-snr5.0") and cut.supervisions[0].alignment["word"]
    plain = soundfile.info(tmp_path / "out" / "audio" / f"{cut.id.split('-sp')[0]}.wav").duration
    assert cut.duration == pytest.approx(plain / 1.25, abs=0.01)
    clean = soundfile.read(tmp_path / "out" / "audio" / f"{cut.id.split('-sp')[0]}.wav")[0]
    noisy = cut.load_audio()[0]
    assert np.abs(noisy[:400]).mean() > 3 * np.abs(clean[:400]).mean()  # the leading silence is not silent any more


def test_a_table_may_name_the_splits_and_lie_in_a_package():
    table = "pkg://nemo_mtbi/samples/librispeech/transcripts.tsv"
    entries = list(read_tsv(SourceConfig("tsv", table, split_column="split")))
    speakers = {s: {e.speaker for e in entries if e.split == s} for s in ("train", "validation", "held_out")}
    assert [len(s) for s in speakers.values()] == [9, 1, 5] and len(set.union(*speakers.values())) == 15
    assert SplitConfig(speakers={entries[0].speaker: "other"}).assign(entries[0]) == entries[0].split
    with pytest.raises(DataError, match="no column part"):
        list(read_tsv(SourceConfig("tsv", table, split_column="part")))
    with pytest.raises(ConfigError, match="no installed package 'nowhere'"):
        list(read_tsv(SourceConfig("tsv", "pkg://nowhere/a.tsv")))
