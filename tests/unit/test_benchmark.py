"""Measures, bootstrap and tables of the generalization benchmark."""

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from nemo_mtbi.evaluation.benchmark import SEEN_PROMPTS, TOPLINE, summarize
from nemo_mtbi.evaluation.benchmark_report import write_report
from nemo_mtbi.evaluation.metrics import HIGHER_IS_BETTER, filled_values, measures, word_errors
from nemo_mtbi.evaluation.statistics import Bootstrap, Sums
from nemo_mtbi.tasks.library import load_library

pytestmark = pytest.mark.unit
TASKS = load_library()


def record(task, answer, utterance="u", **more):
    return {
        "task": task,
        "prompt": "p",
        "answer": answer,
        "utterance": utterance,
        "transcript": "the cat sat",
        "language": "en",
        **more,
    }


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
    assert set(found) <= set(HIGHER_IS_BETTER)


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


def test_bootstrap_equals_scipy_and_pairs_utterances():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 30, 60)
    agreed = rng.binomial(tokens, 0.7)
    ids = [f"u{i:02d}" for i in range(60)]
    sums = Sums.of({i: (float(a), float(t)) for i, a, t in zip(ids, agreed, tokens, strict=True)})
    assert sums.ratio == pytest.approx(agreed.sum() / tokens.sum())
    bootstrap = Bootstrap(ids, 4000)
    low, high = bootstrap.interval(sums)
    reference = stats.bootstrap(
        (agreed, tokens), lambda a, t, axis: a.sum(axis) / t.sum(axis), paired=True, n_resamples=4000, method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.006)
    better = Sums(sums.ids, sums.numerators + 1, sums.denominators)  # better on every utterance
    test = bootstrap.compare(better, sums)
    assert test["difference"] == pytest.approx(60 / tokens.sum()) and test["low"] > 0 and test["p"] <= 1 / 2000
    assert bootstrap.compare(sums, sums)["p"] == 1.0
    assert Bootstrap(ids, 4000).interval(sums) == (low, high)  # the seed decides


def test_summary_and_report(tmp_path):
    def rows(agreed, answers):
        return {
            f"u{i}": record("repeat", a, f"u{i}", tokens=4, agreed=agreed[i], kl=4.0 - agreed[i])
            for i, a in enumerate(answers)
        }

    records = {
        TOPLINE: {SEEN_PROMPTS: rows([4.0] * 3, ["the cat sat"] * 3)},
        "cascade": {SEEN_PROMPTS: rows([2.0, 3.0, 2.0], ["the cat", "a cat sat", "cat"])},
        "ours": {SEEN_PROMPTS: rows([3.0, 4.0], ["the cat sat", "the cat sat"])},
    }
    summary = summarize(records, TASKS, "cascade", 200)
    ours = summary[SEEN_PROMPTS]["ours"]
    assert ours["scores"]["token_agreement"]["value"] == pytest.approx(7 / 8) and ours["missing"] == 1
    assert summary[SEEN_PROMPTS][TOPLINE]["scores"]["token_agreement"]["value"] == 1.0
    assert ours["against"]["token_agreement"]["difference"] == pytest.approx(7 / 8 - 7 / 12)
    assert "against" not in summary[SEEN_PROMPTS]["cascade"]
    about = {"trained_tasks": ["repeat"], "unseen_tasks": ["reply"], "systems": {}, "baseline": "cascade", "resamples": 200,
             "seconds_to_first_token": {"cascade": 0.5}}  # fmt: skip
    paths = write_report(tmp_path, {"held_out": summary}, about, "python x <y>")
    text = paths["md"].read_text()
    assert "| ours | 0.875 [" in text and "paired difference to cascade" in text and "jiwer 4" in text
    page = paths["html"].read_text()
    assert "data:image/png" in page and "python x &lt;y&gt;" in page and paths["png"].stat().st_size > 5000
