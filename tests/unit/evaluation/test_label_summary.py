"""Scores against labels: by attribute, with intervals over speakers, and what was answered for each label."""

import numpy as np
import pytest

from nemo_mtbi.evaluation.benchmark_report import _sections, plot_confusions
from nemo_mtbi.evaluation.summary import confusion, summarize_labels

pytestmark = pytest.mark.unit


def record(number, speaker, label, choice, task="gender", choices=("male", "female")):
    return {
        "utterance": f"u{number}",
        "speaker": speaker,
        "task": task,
        "reference": label,
        "choice": choice,
        "answer": choice,
        "choices": list(choices),
        "metric": "accuracy",
        "language": "en",
        "prompt": "?",
    }


def answers(right):
    """Ten speakers of ten recordings, all of a speaker right or all wrong."""
    rows = {}
    for number in range(100):
        label, speaker = ("male", "female")[number % 2], f"s{number // 10}"
        other = ("female", "male")[number % 2]
        rows[str(number)] = record(number, speaker, label, label if number // 10 in right else other)
    rows["age"] = record(0, "s0", "child", "adult", "age", ("child", "adult"))
    return rows


def test_intervals_resample_speakers_and_each_attribute_has_its_own():
    found = summarize_labels({"mtbi": answers(range(7)), "cascade": answers(range(3))}, "cascade", 500)
    gender = found["mtbi"]["tasks"]["gender"]
    score = gender["scores"]["accuracy_likelihood"]
    assert score["value"] == 0.7 and gender["answers"] == 100
    # Ten independent draws of 0.7, not a hundred.
    assert score["high"] - score["low"] == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 10), rel=0.25)
    assert gender["against"]["accuracy_likelihood"]["difference"] == pytest.approx(0.4)
    assert gender["confusion"] == {"male": {"male": 35, "female": 15}, "female": {"male": 15, "female": 35}}
    age = found["mtbi"]["tasks"]["age"]
    assert age["scores"]["accuracy_text"]["value"] == 0 and age["confusion"] == {"child": {"child": 0, "adult": 1}}


def test_recordings_without_a_speaker_are_resampled_by_themselves():
    rows = {i: {**r, "speaker": None} for i, r in answers(range(7)).items() if r["task"] == "gender"}
    score = summarize_labels({"mtbi": rows}, "cascade", 500)["mtbi"]["tasks"]["gender"]["scores"]["accuracy_text"]
    assert score["high"] - score["low"] == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 100), rel=0.25)


def test_what_has_no_choices_has_no_confusions():
    assert confusion([record(0, "s", "words", None, choices=())]) == {}
    assert confusion([{**record(0, "s", "male", None)}]) == {}  # a system without probabilities
    assert plot_confusions({"salm": {"tasks": {"wer": {"scores": {}}}}}) is None


def test_the_report_shows_both():
    found = summarize_labels({"mtbi": answers(range(7)), "cascade": answers(range(3))}, "cascade", 50)
    titles = dict(_sections("voice", {"labels": found}, "cascade"))
    table = titles["voice: labels, choice, by likelihood by task"]
    assert table[0] == ["system", "age", "gender"] and table[1][2].startswith("0.700 [")
    figure = plot_confusions(found)
    assert [axis.get_title() for axis in figure.axes][:2] == ["age", "gender"] and len(figure.axes) == 4


def test_copies_of_a_sentence_are_resampled_together():
    """Ten sentences of ten recordings by ten speakers each, as SLURP has several of one sentence."""
    rows = {i: {**r, "group": r["speaker"], "speaker": f"v{i}"} for i, r in answers(range(7)).items() if i != "age"}
    entry = summarize_labels({"mtbi": rows}, "cascade", 500)["mtbi"]["tasks"]["gender"]
    score = entry["scores"]["accuracy_text"]
    assert entry["units"] == 10
    assert score["high"] - score["low"] == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 10), rel=0.25)


def test_labels_of_two_questions_are_two_classes():
    levels = ("low", "medium", "high")
    pitch = [record(i, f"s{i}", levels[i % 3], levels[i % 3], "pitch", levels) for i in range(12)]
    rate = [record(i, f"s{i}", levels[i % 3], "medium", "rate", levels) for i in range(12)]
    rows = {str(i): r for i, r in enumerate(pitch + rate)}
    found = summarize_labels({"mtbi": rows}, "cascade", 20)["mtbi"]
    by_task = [found["tasks"][t]["scores"]["f1_likelihood"]["value"] for t in ("pitch", "rate")]
    assert by_task == [1.0, pytest.approx(0.5 / 3)]
    assert found["scores"]["f1_likelihood"]["value"] == pytest.approx(sum(by_task) / 2)


def test_few_speakers_have_no_interval():
    rows = {i: r for i, r in answers(range(7)).items() if r["speaker"] < "s4" and i != "age"}
    found = summarize_labels({"mtbi": rows, "cascade": rows}, "cascade", 20)
    score = found["mtbi"]["tasks"]["gender"]["scores"]["accuracy_text"]
    assert score == {"value": 1.0, "low": None, "high": None}
    table = dict(_sections("voice", {"labels": found}, "cascade"))["voice: labels, choice, by text by task"]
    assert table[1][1] == "1.000"
