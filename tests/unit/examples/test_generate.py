"""`mtbi generate` over many recordings, of which one is too long for the LLM."""

import json

import pytest

from nemo_mtbi.errors import DataError
from nemo_mtbi.examples.generate import answers, written

pytestmark = pytest.mark.unit


class Model:
    """Answers a batch, unless a recording in it is too long."""

    def user_turn(self, question):
        return question

    def listen(self, audios):
        return audios

    def generate(self, dialogs, heard, **options):
        if "long" in heard:
            raise DataError("too long")
        return [f"{question} {audio}" for (question,), audio in zip(dialogs, heard, strict=True)]


def test_one_recording_that_does_not_fit_costs_no_other_its_answer(tmp_path):
    loaded = [(name, name) for name in ("a", "long", "b")]
    found = dict(answers(Model(), "What?", loaded, [audio for _, audio in loaded], {}))
    assert found[("a", "a")] == "What? a" and found[("b", "b")] == "What? b"
    assert isinstance(found[("long", "long")], DataError)


def test_answers_are_written_however_it_ends(tmp_path):
    records = []
    with pytest.raises(KeyboardInterrupt), written(str(tmp_path / "out.jsonl"), records):
        records.append({"answer": "yes"})
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"answer": "yes"}
