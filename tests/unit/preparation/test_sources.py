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
        (SourceConfig("sentences", None, options={"voice": "x"}), "kind sentences: Key 'voice'"),
        (SourceConfig("sentences", None, options={"count": "ten"}), "kind sentences: .*'ten'"),
        (SourceConfig("sentences", None, options={"voices": []}), r"voices=\[\] gives no sentences"),
        (SourceConfig("sentences", None, options={"renditions": 0}), "renditions=0"),
        (SourceConfig("sentences", None, options={"held_out": -5}), "held_out=-5"),
        (SourceConfig("sentences", None, options={"speeds": 1.1}), "kind sentences"),
        (SourceConfig("no_speech", None, options={"counts": 30}), "kind no_speech"),
        (SourceConfig("no_speech", None, options={"seconds": [1, 2, 3]}), "shortest, longest"),
        (SourceConfig("no_speech", None, options={"seconds": 5}), "kind no_speech"),
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
    with pytest.raises(DataError, match="there is no text.*line 1"):
        Preparation(config(tmp_path, SourceConfig("nemo", str(broken)))).run()
    table = tmp_path / "t.tsv"
    table.write_text("file\ttext\nx\ty\n")
    with pytest.raises(DataError, match="no column"):
        Preparation(config(tmp_path, SourceConfig("tsv", str(table)))).run()


def test_lhotse_recipe(tmp_path):
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121123"
    chapter.mkdir(parents=True)
    soundfile.write(chapter / "84-121123-0000.flac", 0.1 * np.sin(np.arange(16000)), 16000)
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "nemo", "folder"])
def test_encodings(tmp_path, kind, encoding):
    """Latin-1 must be named; until it is, nothing of another source is lost."""
    tone(tmp_path / "in" / "a.b.wav")
    texts = {
        "tsv": "path\ttranscript\tspeaker\r\na.b.wav\tcafé é\t\r\n",
        "csv": 'path;transcript\r\n"a.b.wav";"café é"\r\n',
        "nemo": json.dumps({"audio_filepath": "a.b.wav", "text": "café é"}, ensure_ascii=False) + "\r\n",
        "folder": "café\r\né",
    }
    file = tmp_path / "in" / {"tsv": "t.tsv", "csv": "t.csv", "nemo": "m.json", "folder": "a.b.txt"}[kind]
    file.write_bytes(texts[kind].encode(encoding))
    path = str(file.parent if kind == "folder" else file)
    if encoding == "latin-1":
        place = "its transcript:" if kind == "folder" else rf"{file.name}, line \d:"
        with pytest.raises(DataError, match=f"{place} byte 0xe9 is no UTF-8"):
            Preparation(config(tmp_path, SourceConfig(kind, path))).run()
    own = encoding if encoding == "latin-1" else None
    (cut,) = cuts_of(Preparation(config(tmp_path, SourceConfig(kind, path, "x", encoding=own))).run())
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("café é", None)
    assert cut.id.startswith("x-a.b-") if kind == "nemo" else cut.id == "x-a.b"


def test_a_manifest_with_every_kind_of_line(tmp_path):
    tone(tmp_path / "a.wav", 3.0)
    good = {"audio_filepath": "a.wav", "text": "one two"}
    rows = [
        good | {"speaker": 7, "duration": None},
        "",
        "no JSON",
        good | {"speaker_id": "7", "text": 12, "offset": 1, "duration": 1},
        [1],
        good | {"text": None},
        good | {"speaker": "ann", "language": "de", "offset": None},
        good | {"duration": -2},
    ]
    manifest = tmp_path / "m.json"
    manifest.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    preparation = Preparation(config(tmp_path, SourceConfig("nemo", str(manifest), language="en")))
    cuts = {c.id: c for c in cuts_of(preparation.run())}
    found = {(s.text, s.speaker, s.language, c.duration) for c in cuts.values() for s in c.supervisions}
    assert found == {("one two", "7", "en", 3.0), ("12", "7", "en", 1.0), ("one two", "ann", "de", 3.0)}
    places = report(tmp_path)["skipped_where"]
    assert sorted(p.rsplit(" ", 1)[1] for where in places.values() for p in where) == ["3", "5", "6", "8"]
    assert places["there is no text"] == [f"{manifest}, line 6"]
    rows[2] = good | {"text": "three"}  # repaired: the rest is not prepared again
    manifest.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    assert len(cuts_of(preparation.run())) == 4 and report(tmp_path)["skipped"] == 3


def test_rows_of_a_table_that_cannot_be_used(tmp_path):
    for name in ("utt.1", "utt.2", "c"):
        tone(tmp_path / f"{name}.wav").rename(tmp_path / (f"{name}.wav" if name == "c" else name))
    lines = ["path\ttranscript\tspeaker", "utt.1\tone\t1", "", "utt.2\ttwo\t", "\tthree\t3", "c.wav\tx\ty\tz", "c.wav"]
    (tmp_path / "t.tsv").write_text("\r\n".join(lines))
    cuts = cuts_of(Preparation(config(tmp_path, SourceConfig("tsv", str(tmp_path / "t.tsv"), "x"))).run())
    assert {c.id: c.supervisions[0].speaker for c in cuts} == {"x-utt.1": "1", "x-utt.2": None}
    places = report(tmp_path)["skipped_where"]
    assert {r: w[0].rsplit(" ", 1)[1] for r, w in places.items()} == {
        "path is empty": "5",
        "4 cells, but the header has 3": "6",
        "empty transcript": "7",
    }
    with open(tmp_path / "t.tsv", "a") as table:
        table.write("\tagain\r\nutt.1\tagain\t1\r\n")
    with pytest.raises(DataError, match=r"x-utt.1 occurs twice .*line 2 and .*line 8"):
        Preparation(config(tmp_path, SourceConfig("tsv", str(tmp_path / "t.tsv"), "x"))).run()


def test_a_quotation_mark_without_an_end_is_named(tmp_path):
    """It would make one cell of all that follows."""
    rows = ["path,transcript,speaker", 'a.wav,"""hello"" there",s1', 'b.wav,"good day,s2', "c.wav,fine,s3"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"t.csv, line 3: a cell begins with a quotation mark"):
        list(read_tsv(SourceConfig("csv", str(tmp_path / "t.csv"))))
    (tmp_path / "t.csv").write_text("\n".join([*rows[:2], 'b.wav,"good" day,s2', rows[3]]))
    entries = list(read_tsv(SourceConfig("csv", str(tmp_path / "t.csv"))))
    assert [e.text for e in entries if not e.problem] == ['"hello" there', "fine"] and len(entries) == 3


def test_a_named_column_of_speakers_must_be_there(tmp_path):
    (tmp_path / "t.tsv").write_text("path\ttranscript\tclient_id\na.wav\tone\tx\n")
    assert [e.speaker for e in read_tsv(SourceConfig("tsv", str(tmp_path / "t.tsv")))] == [None]
    with pytest.raises(DataError, match="no column clientid"):
        list(read_tsv(SourceConfig("tsv", str(tmp_path / "t.tsv"), speaker_column="clientid")))


def test_numbers_that_are_none(tmp_path):
    """As pandas writes empty cells."""
    tone(tmp_path / "a.wav")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(
        '{"audio_filepath": "a.wav", "text": "one", "speaker": NaN}\n{"audio_filepath": "a.wav", "text": NaN}\n'
    )
    (cut,) = cuts_of(Preparation(config(tmp_path, SourceConfig("nemo", str(manifest)))).run())
    assert cut.supervisions[0].speaker is None and report(tmp_path)["skipped"] == 1


@pytest.mark.parametrize(
    "content", ['{"audio_filepath": "a.wav", "text": "x"}\n', "no json\n", '{"id": "r"}\n', "\ufeff{}\n"]
)
def test_other_tools_manifests_are_named(tmp_path, content):
    (tmp_path / "cuts.jsonl").write_text(content)
    with pytest.raises(DataError, match="cuts.jsonl cannot be read"):
        Preparation(config(tmp_path, SourceConfig("cuts", str(tmp_path / "cuts.jsonl")))).run()


def test_repaired_audio_is_counted(tmp_path):
    t = 0.1 * np.sin(np.arange(16000) / 20)
    for name, channels in {"fine": [t, t], "phase": [t, -t], "offset": [t + 0.4, t]}.items():
        soundfile.write(tmp_path / f"{name}.wav", np.stack(channels, 1), 16000)
        (tmp_path / f"{name}.txt").write_text("two words")
    Preparation(config(tmp_path, SourceConfig("folder", str(tmp_path)))).run()
    assert sorted(report(tmp_path)["audio_repaired"].values()) == [1, 1]


def test_a_table_may_name_the_splits_and_lie_in_a_package():
    table = "pkg://nemo_mtbi/samples/librispeech/transcripts.tsv"
    entries = list(read_tsv(SourceConfig("tsv", table, split_column="split")))
    speakers = {s: {e.speaker for e in entries if e.split == s} for s in ("train", "validation", "held_out")}
    assert [len(s) for s in speakers.values()] == [7, 3, 5] and len(set.union(*speakers.values())) == 15
    assert SplitConfig(speakers={entries[0].speaker: "other"}).assign(entries[0]) == entries[0].split
    with pytest.raises(DataError, match="no column part"):
        list(read_tsv(SourceConfig("tsv", table, split_column="part")))
    with pytest.raises(ConfigError, match="no installed package 'nowhere'"):
        list(read_tsv(SourceConfig("tsv", "pkg://nowhere/a.tsv")))
