"""Labelled questions and their scores."""

import json

import pytest
from transformers import AutoTokenizer

from nemo_mtbi.errors import DataError
from nemo_mtbi.evaluation.labelled import label_measures, labelled_cuts

pytestmark = pytest.mark.unit


def test_slots_are_asked_with_the_values_of_the_whole_table(labels, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    cuts, transcribed = labelled_cuts(
        "coffee", {"kind": "slots", "path": str(labels / "labels.tsv"), "utterances": 1}, tokenizer, 2, labels
    )
    (cut,) = cuts
    size, milk = cut.custom["targets"]
    assert not transcribed and size["response"] == "small" and tokenizer.decode(size["response_ids"][:-1]) == "small"
    assert size["prompt"] == "Which size was ordered? Answer with one of these and nothing else: large, small."
    assert milk["prompt"].startswith("Which milk type was ordered?")
    label = cut.custom["labels"][size["prompt_id"]]
    assert (label["metric"], label["choices"]) == ("accuracy", ["large", "small"])
    row = {
        "reference": "small",
        "answer": "A small one.",
        "choice": "large",
        "choices": ["large", "small"],
        "metric": "accuracy",
        "language": "en",
    }
    found = label_measures(row)
    assert (found["accuracy_text"], found["accuracy_likelihood"]) == ((1.0, 1.0), (0.0, 1.0))
    assert label_measures({**row, "choices": [], "metric": "wer"})["wer"] == (2.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("slots", "t.tsv", "path\tslots\na.wav\tno json\n"),
        ("slurp", "test.jsonl", '{"sentence": "x"}\n'),
        ("mmau", "m.json", '{"id": 1}'),
        ("spoken_squad", "s.json", '{"data": [{"title": "x"}]}'),
        ("voicebench", "v.parquet", "no parquet"),
    ],
)
def test_corpora_of_another_form_are_named(labels, smollm2, kind, name, content):
    (labels / name).write_text(content)
    with pytest.raises(DataError, match=name):
        labelled_cuts(
            "mine", {"kind": kind, "path": str(labels / name)}, AutoTokenizer.from_pretrained(smollm2), 2, labels
        )


@pytest.mark.parametrize(
    "row, message",
    [
        ({"metric": "f1"}, "metrics are accuracy"),
        ({"metric": "accuracy"}, "accuracy needs choices"),
        ({"colour": "red"}, "line 1: TypeError"),
        ({"audio": "absent.wav"}, "absent.wav .there is no such file"),
        ({"metric": "accuracy", "choices": ["yes", "no"], "label": "Yes"}, "'Yes' .* is none of the choices"),
    ],
)
def test_bad_labels_name_the_line(labels, smollm2, row, message):
    file = labels / "q.jsonl"
    good = {"audio": "a.wav", "task": "qa", "prompt": "What?", "label": "it", "transcript": "what is it"}
    file.write_text(json.dumps(good | row) + "\n")
    with pytest.raises(DataError, match=message):
        labelled_cuts("qa", {"kind": "jsonl", "path": str(file)}, AutoTokenizer.from_pretrained(smollm2), 2, labels)
    file.write_text(json.dumps(good) + "\n")
    cuts, transcribed = labelled_cuts(
        "qa", {"kind": "jsonl", "path": str(file)}, AutoTokenizer.from_pretrained(smollm2), 2, labels
    )
    assert transcribed and next(iter(cuts)).supervisions[0].text == "what is it"
