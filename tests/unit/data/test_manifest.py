"""NeMo manifests as they are found, and what ``generate`` makes of them."""

import json

import numpy as np
import pytest
import soundfile

from nemo_mtbi.data.audio_inputs import audio_inputs
from nemo_mtbi.data.manifest import read_manifest
from nemo_mtbi.errors import DataError

pytestmark = pytest.mark.unit


def manifest(path, *rows):
    """Rows that are no strings are written as JSON."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def only(tmp_path, **fields):
    (line,) = read_manifest(manifest(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", **fields}))
    return line


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"text": "hi"}, {"text": "hi"}),
        ({"text": 7}, {"text": "7"}),
        ({"text": 7.5}, {"text": "7.5"}),
        ({"text": ""}, {"text": ""}),
        ({"text": None}, {"text": None}),
        ({}, {"text": None, "offset_seconds": 0.0, "duration_seconds": None, "speaker": None, "language": None}),
        ({"duration": None, "offset": None}, {"offset_seconds": 0.0, "duration_seconds": None}),
        ({"duration": "1.5", "offset": 2}, {"offset_seconds": 2.0, "duration_seconds": 1.5}),
        ({"speaker": 3}, {"speaker": "3"}),
        ({"speaker": 3.0}, {"speaker": "3"}),
        ({"speaker_id": "3"}, {"speaker": "3"}),
        ({"speaker": None, "speaker_id": 4}, {"speaker": "4"}),
        ({"speaker": ""}, {"speaker": None}),
        ({"lang": "de"}, {"language": "de"}),
        ({"language": "de"}, {"language": "de"}),
        ({"source_lang": "de"}, {"language": "de"}),
    ],
)
def test_fields(tmp_path, fields, expected):
    line = only(tmp_path, **fields)
    assert line.problem is None and {k: getattr(line, k) for k in expected} == expected


@pytest.mark.parametrize(
    "row, problem",
    [
        ("{", "no JSON"),
        ("7", "a JSON int, not an object"),
        ('"a.wav"', "a JSON str"),
        ("null", "a JSON NoneType"),
        ("[1]", "a JSON list"),
        ("9" * 5000, "no JSON"),
        ("[" * 100_000, "no JSON"),
        ({}, "audio_filepath is missing"),
        ({"audio_filepath": None}, "audio_filepath is null"),
        ({"audio_filepath": " "}, "audio_filepath is"),
        ({"audio_filepath": ["a.wav"]}, "audio_filepath is"),
        ({"audio_filepath": "a\0b.wav"}, None),
        ({"audio_filepath": "x" * 5000}, "no path"),
        ({"audio_filepath": "a.wav", "text": ["x"]}, "text is"),
        ({"audio_filepath": "a.wav", "text": True}, "text is true"),
        ({"audio_filepath": "a.wav", "text": "\ud800"}, "half a character"),
        ({"audio_filepath": "a.wav", "duration": 0}, "duration is 0"),
        ({"audio_filepath": "a.wav", "duration": -1}, "duration is -1"),
        ({"audio_filepath": "a.wav", "duration": "long"}, "duration is"),
        ({"audio_filepath": "a.wav", "offset": float("nan")}, "offset is NaN"),
        ({"audio_filepath": "a.wav", "offset": 10**400}, "offset is 1000"),
    ],
)
def test_a_broken_line_is_named_and_the_rest_goes_on(tmp_path, row, problem):
    path = manifest(
        tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "text": "one"}, "", row, {"audio_filepath": "b.wav"}
    )
    lines = list(read_manifest(path))
    assert [line.number for line in lines] == [1, 3, 4]
    assert [line.audio for line in (lines[0], lines[2])] == [tmp_path / "a.wav", tmp_path / "b.wav"]
    assert lines[1].where == f"{path}, line 3"
    if problem is not None:
        assert problem in lines[1].problem


@pytest.mark.parametrize("form", ["jsonl", "json", "array", "indented"])
def test_forms_of_the_file(tmp_path, form):
    rows = [{"audio_filepath": f"{i}.wav", "text": f"t {i}"} for i in range(3)]
    path = tmp_path / ("m.jsonl" if form == "jsonl" else "m.json")
    if form in ("jsonl", "json"):
        manifest(path, *rows)
    else:
        path.write_text(json.dumps(rows, indent=2 if form == "indented" else None))
    assert [(line.number, line.text) for line in read_manifest(path)] == [(i + 1, f"t {i}") for i in range(3)]


def test_relative_paths(tmp_path, monkeypatch):
    """They start at the manifest or ``audio_root``; at the working directory if only there is something."""
    for folder in ("data", "work", "root"):
        (tmp_path / folder).mkdir()
    (tmp_path / "work" / "w.wav").touch()
    monkeypatch.chdir(tmp_path / "work")
    path = manifest(tmp_path / "data" / "m.json", *({"audio_filepath": a} for a in ("a.wav", "w.wav", "/x/y.wav")))
    assert [str(line.audio) for line in read_manifest(path)] == [str(path.parent / "a.wav"), "w.wav", "/x/y.wav"]
    assert next(read_manifest(path, audio_root="../root")).audio.parts[-2:] == ("root", "a.wav")


def test_an_empty_manifest_is_refused(tmp_path):
    for text in ("", "\n\n", "[]"):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(DataError, match=r"m\.json is empty"):
            list(read_manifest(tmp_path / "m.json"))


def test_generate_hears_the_parts_that_a_manifest_names(tmp_path):
    """Each second of the file has its own level."""
    rate = 16_000
    second = np.sin(np.arange(rate) / 5)
    soundfile.write(tmp_path / "a.wav", np.concatenate([level * second for level in (0.1, 0.2, 0.4)]), rate)
    path = manifest(
        tmp_path / "m.jsonl",
        {"audio_filepath": "a.wav", "offset": 0, "duration": 1},
        {"audio_filepath": "a.wav", "offset": 1.0, "duration": 1.0},
        {"audio_filepath": "a.wav", "offset": 2, "duration": None},
        {"audio_filepath": "a.wav", "duration": None},
        "broken",
        {"audio_filepath": "a.wav", "offset": 2.5, "duration": 1.0},
        {"audio_filepath": "a.wav", "offset": 4},
    )
    inputs = list(audio_inputs([str(path), str(tmp_path / "a.wav"), str(tmp_path)]))
    waveforms = [next(iter(i.open(rate))) for i in inputs[:4]]
    assert [len(w) for w in waveforms] == [rate, rate, rate, 3 * rate]
    assert [round(float(abs(w).max()), 2) for w in waveforms] == [0.1, 0.2, 0.4, 0.4]
    assert str(inputs[1]).endswith("a.wav (1 s to 2 s)") and str(inputs[2]).endswith("(2 s to end)")
    assert inputs[1].to_dict() == {"audio": str(tmp_path / "a.wav"), "offset": 1.0, "duration": 1.0}
    for index, message in (
        (4, r"m\.jsonl, line 5: no JSON"),
        (5, "3.50 s, but the audio lasts 3.00"),
        (6, "offset = 4"),
    ):
        with pytest.raises(DataError, match=message):
            inputs[index].open(rate)
    assert [i.path for i in inputs[7:]] == [tmp_path / "a.wav"] * 2


def test_nothing_to_hear_is_refused(tmp_path):
    with pytest.raises(DataError, match="No audio file"):
        list(audio_inputs(str(tmp_path)))
    (absent,) = audio_inputs(str(tmp_path / "absent.wav"))
    with pytest.raises(DataError, match="no audio file"):
        absent.open(16_000)
