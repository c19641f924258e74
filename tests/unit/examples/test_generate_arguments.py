"""``mtbi generate MODEL AUDIO... "any text"``."""

import io

import pytest

from nemo_mtbi.examples._generate_arguments import to_overrides
from nemo_mtbi.examples._overrides import read

pytestmark = pytest.mark.unit
TEXT = '7 "things", it\'s {x} ${y} = \\ : ä 🙂\n- [a]'


def values(*arguments):
    pairs = (o.partition("=") for o in to_overrides(list(arguments)))
    return {key: read(text) for key, _, text in pairs}


def test_words_are_model_recordings_and_question():
    assert values("mtbi-step=200.ckpt", "rec (1).wav", "b=c.wav", TEXT) == {
        "model": "mtbi-step=200.ckpt",
        "audio": ["rec (1).wav", "b=c.wav"],
        "prompt": [TEXT],
    }
    assert values("m", "a.wav", "--json", "--max-new-tokens", "5", "--", "-h") == {
        "model": "m",
        "audio": ["a.wav"],
        "prompt": ["-h"],
        "json": True,
        "max_new_tokens": 5,
    }


def test_options_and_several_questions(tmp_path, monkeypatch):
    file = tmp_path / "q.txt"
    file.write_text(TEXT + "\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nstdin\n"))
    given = values("m", "a.wav", "--prompt", "@one", "--prompt", "-", "--prompt-file", str(file))
    assert given == {"model": "m", "audio": ["a.wav"], "prompt": ["@one", "from\nstdin", TEXT]}
    assert values("--model", "m", "--audio", "a.wav", "--audio", "b.wav", "--prompt=-x") == {
        "model": "m",
        "audio": ["a.wav", "b.wav"],
        "prompt": ["-x"],
    }
    assert values("--model", "m", "--audio", "a.wav", "Why?")["prompt"] == ["Why?"]


def test_the_form_for_launch_files_stays():
    arguments = ["model=a", "audio=b", "prompt=c", "hydra.job.name=x"]
    assert to_overrides(arguments) == arguments and to_overrides(["--cfg", "job"]) == ["--cfg", "job"]


@pytest.mark.parametrize(
    "arguments", [["m"], ["m", "a.wav"], ["m", "--prompt", "x"], ["m", "a", "--prompt-file", "no"]]
)
def test_what_is_missing_is_said(arguments, capsys):
    with pytest.raises(SystemExit):
        to_overrides(arguments)
    message = capsys.readouterr().err
    assert "missing" in message or "cannot be read" in message


def test_a_forgotten_question_is_no_recording(tmp_path, capsys):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit):
        to_overrides(["m", str(tmp_path / "a.wav"), str(tmp_path / "b.wav")])
    assert "b.wav is a file" in capsys.readouterr().err
