"""Measures of each kind of task."""

import pytest
import sacrebleu

from nemo_mtbi.evaluation.benchmark_report import TITLES
from nemo_mtbi.evaluation.metrics import filled_values, measures, word_errors
from tests.unit.evaluation_helpers import TASKS, record

pytestmark = pytest.mark.unit


def test_measures_of_each_kind_of_task():
    own = record("repeat", "The cat sat.")
    found = measures(record("repeat", "the bat sat down", tokens=8, agreed=6.0, kl=2.0), own, TASKS["repeat"])
    assert found["wer"] == found["wer_to_text_llm"] == (2.0, 3.0)
    assert found["token_agreement"] == (6.0, 8) and found["kl_per_token"] == (2.0, 8)
    assert found["rouge_l"][0] == pytest.approx(2 * 2 / (3 + 4))  # F of 2 common words among 3 and 4
    assert found["chrf"][0] == pytest.approx(sacrebleu.sentence_chrf("the bat sat down", ["The cat sat."]).score / 100)
    own = record("sentiment", "Positive.", choice="neutral")
    found = measures(record("sentiment", "It is positive", choice="positive"), own, TASKS["sentiment"])
    assert found["accuracy_text"] == (1.0, 1) and found["accuracy_likelihood"] == (0.0, 1) and found["form"] == (1.0, 1)
    assert "token_agreement" not in found and "wer" not in found
    found = measures(record("sentiment", "positive or negative"), own, TASKS["sentiment"])
    assert found["accuracy_text"] == (0.0, 1) and found["form"] == (0.0, 1) and "accuracy_likelihood" not in found
    assert "accuracy_text" not in measures(own, record("sentiment", "no idea"), TASKS["sentiment"])
    assert set(found) <= set(TITLES)


def test_the_language_that_a_prompt_asks_for_is_checked():
    task = TASKS["translation"]
    assert filled_values(task, "Say this in French.") == {"language": "French"}
    french = record("translation", "le chat est sur la table") | {"prompt": "Say this in French."}
    german = french | {"answer": "die Katze ist auf dem Tisch und nicht da"}
    assert measures(french, french, task)["form"] == (1.0, 1) and measures(german, french, task)["form"] == (0.0, 1)


def test_word_errors_are_counted_after_whispers_normalizer():
    assert word_errors("Mr. Smith won't pay twenty dollars", "mister smith will not pay $20") == (0.0, 6.0)
    assert word_errors("", "noise") == (0.0, 0.0)
    assert word_errors("Ärger im Büro", "ärger im büro!", "de-DE") == (0.0, 3.0)


def test_other_scripts_have_words_too():
    text = "Привет, мир"
    assert measures(record("repeat", text), record("repeat", text), TASKS["repeat"])["rouge_l"][0] == 1.0
