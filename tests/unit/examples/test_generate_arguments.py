"""``mtbi generate MODEL AUDIO... "any text"``."""

import io

import pytest
from omegaconf import OmegaConf

from nemo_mtbi.errors import MTBIError
from nemo_mtbi.examples._generate_arguments import YAML, to_overrides
from nemo_mtbi.examples._overrides import read
from nemo_mtbi.examples.generate import check

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
    assert message.count("mtbi generate MODEL") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({"max_new_tokens": value}, "max_new_tokens=.*at least 1") for value in (0, -3, 2.5, "many", None, True)],
        ({"batch_size": 0}, "batch_size=0: give"),
        ({"prompt": []}, "prompt is empty"),
        ({"model": "absent.nemo"}, "There is no model absent.nemo"),
        ({"audio": ["no.wav", "neither.wav"]}, "no audio file no.wav, neither.wav"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_imported(tmp_path, change, message):
    (tmp_path / "m.nemo").touch()
    (tmp_path / "a.wav").touch()
    values = {"model": str(tmp_path / "m.nemo"), "audio": [str(tmp_path / "a.wav"), "absent.wav"], "prompt": ["Why?"]}
    cfg = OmegaConf.merge(OmegaConf.load(YAML), values, change)
    with pytest.raises(MTBIError, match=message):
        check(cfg, list(cfg.audio), list(cfg.prompt))
    cfg = OmegaConf.merge(OmegaConf.load(YAML), values)
    check(cfg, list(cfg.audio), list(cfg.prompt))  # one of the recordings is there


def test_a_forgotten_question_is_no_recording(tmp_path, capsys):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit):
        to_overrides(["m", str(tmp_path / "a.wav"), str(tmp_path / "b.wav")])
    assert "b.wav is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["m", "{audio}", "What", "is", "this", "about?"],
            "'What' is no file: put a question of several words in quotes",
        ),
        (["m", "{audio}", "hi", "max_new_tokens=3"], "--max-new-tokens 3"),
    ],
)
def test_questions_without_quotes_and_settings_are_not_taken_for_recordings(tmp_path, arguments, message, capsys):
    (tmp_path / "q.wav").touch()
    with pytest.raises(SystemExit):
        to_overrides([a.format(audio=tmp_path / "q.wav") for a in arguments])
    assert message in capsys.readouterr().err
    assert to_overrides(["--help"]) == ["--help"]
