"""Scores of a run and their tables."""

import pytest

from nemo_mtbi.evaluation.report import markdown, plot
from nemo_mtbi.evaluation.score import Scores, compared, word_error_rate
from nemo_mtbi.io.text import normalized

pytestmark = pytest.mark.unit


def test_scores_and_their_tables(tmp_path):
    scores = Scores()
    scores.tokens["about"], scores.agreed["about"], scores.kl["about"] = 4, 3.0, 2.0
    scores.tokens["repeat"], scores.agreed["repeat"], scores.kl["repeat"] = 6, 6.0, 0.0
    scores.repeats = [("The cat sat.", "the cat sat", "the cat sat"), ("a dog", "a big dog", "a big dog ran")]
    summary = scores.summary()
    assert summary["token_agreement"] == pytest.approx(0.9) and summary["kl_per_token"] == pytest.approx(0.2)
    assert summary["repeat_wer"] == pytest.approx(1 / 6) and summary["repeat_wer_to_transcript"] == pytest.approx(2 / 7)
    text = markdown({"held_out": {"imitation": summary}}, "python x")
    assert "| imitation | 0.900 | 0.200 | 0.167 | 0.286 |" in text
    plot({"held_out": {"imitation": summary}, "other": {"imitation": summary}}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("marks", ["''", '""', "\u2018\u2019", "\u201c\u201d"])
def test_quotation_marks_of_any_kind_are_no_words(marks):
    said = f"{marks[0]}Don't go,{marks[1]} he said."
    assert word_error_rate([compared("Don't go, he said.")], [compared(said)]) == 0.0
    assert compared("don\u2019t") == "don't"


def test_normalization_and_word_error_rate():
    assert normalized("It's  HERE, isn't it?") == "it's here isn't it"
    assert word_error_rate(["", "a b"], ["noise", "a c"]) == 0.5
    assert word_error_rate([], []) == 0.0
