"""Corpora as they are published and exported: answers written otherwise than the choices, brackets, broken rows."""

import json

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from sklearn.metrics import f1_score

from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.evaluation.benchmark import check_names
from nemo_mtbi.evaluation.labelled import label_measures, labelled_cuts
from nemo_mtbi.evaluation.metrics import contains, word_errors
from nemo_mtbi.evaluation.predictions import newest_alone
from nemo_mtbi.evaluation.statistics import BLOCK, Bootstrap, Sums
from nemo_mtbi.evaluation.summary import summarize_labels
from nemo_mtbi.tasks.forms import choose
from tests.helpers import build
from tests.unit.evaluation.test_corpora import ask, voicebench, wav, write

pytestmark = pytest.mark.unit


def mmau(folder, *rows):
    common = {"audio_id": "a.wav", "question": "Which?", "task": "speech"}
    return write(folder / "mmau.json", json.dumps([common | row for row in rows]))


def test_mmau_with_answers_that_are_no_choice(tmp_path, capsys):
    path = mmau(
        tmp_path,
        {"choices": ["Seven hundred miles.", "One."], "answer": "Seven hundred miles"},
        {"choices": ["C major", "D minor"], "answer": "(A) C major"},
        {"choices": ["rest show neutral", "all are sad"], "answer": "rest of them shows neutral"},
        {"choices": [1, 2], "answer": "2"},
        {"choices": ["Yes", "yes."], "answer": "yes"},
        {"choices": ["CM", "Cm"], "answer": "Cm"},
        {"choices": [0, 1], "answer": "0"},
    )
    found = ask("mmau", path, tmp_path)
    assert [q.label for q in found] == ["Seven hundred miles.", "C major", "2", "Cm", "0"]
    assert all(q.label in q.choices for q in found)
    assert "2 questions are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("label", "answer", "language", "expected"),
    [
        ("(A)", "The answer is (A).", "en", 1.0),
        ("(A)", "Option A is correct.", "en", 1.0),
        ("(A)", "(B)", "en", 0.0),
        ("happy", "<<happy>>", "en", 1.0),
        ("Female", '["Female"]', "en", 1.0),
        ("Paris", "The capital (Paris) of France", "en", 1.0),
        ("cat", "a category", "en", 0.0),
        ("北京", "首都是北京。", "zh", 1.0),
        ("()", "anything", "en", 0.0),
    ],
)
def test_brackets_hide_no_words(label, answer, language, expected):
    assert contains(label, answer, language) == (expected, 1.0)


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("2", ["1", "2", "3", "4"], "2"),
        ("It is 2.", ["1", "2", "3", "4"], "2"),
        ("b", ["a", "b"], "b"),
        ("B", ["a", "b"], "b"),
        ("Seven hundred miles", ["Seven hundred miles.", "One mile."], "Seven hundred miles."),
        ("yes", ["yes", "yes", "no"], "yes"),
        ("他很愤怒。", ["愤怒", "高兴"], "愤怒"),
        ("neither", ["a", "b"], None),
        ("21岁", ["1岁", "2岁"], None),
        ("他11岁了", ["1岁", "11岁"], "11岁"),
        ("他很happy。", ["happy", "sad"], "happy"),
        ("I am sure!", ["sure?", "sure!"], "sure!"),
        ("category", ["cat", "dog"], None),
        ("it's so-so.", ["so-so", "bad"], "so-so"),
        ("100% sure", ["100%", "50%"], "100%"),
        ("答案是B。", ["A", "B"], "B"),
    ],
)
def test_choices_in_an_answer(answer, choices, expected):
    record = {"reference": choices[0], "answer": answer, "choices": choices, "choice": None, "metric": "accuracy"}
    right = label_measures(record | {"reference": expected or "x", "language": "en"})["accuracy_text"]
    assert right == (float(expected is not None), 1.0)
    if len(choices[0]) > 1:
        assert choose(answer, choices) == expected
    elif expected is None:
        assert label_measures(record | {"reference": "a", "language": "en"})["accuracy_text"] == (0.0, 1.0)


def test_voicebench_with_letters_in_brackets(tmp_path):
    letter, yes = (
        ask("voicebench", voicebench(tmp_path / own, "bbh", {"prompt": "q", "reference": own}), tmp_path / own)[0]
        for own in ("(B)", "yes")
    )
    assert (letter.label, letter.choices, letter.metric) == ("B", ("B",), "accuracy")
    table = voicebench(
        tmp_path / "sd", "sd-qa", {"prompt": "q", "reference": "C"}, {"prompt": "q", "reference": "Paris"}
    )
    assert [q.metric for q in ask("voicebench", table, tmp_path / "sd")] == ["contains", "contains"]
    assert (yes.label, yes.choices, yes.metric) == ("yes", ("yes", "no"), "accuracy")


@pytest.mark.parametrize(
    "row",
    [
        {"label": float("nan")},
        {"label": "x", "others": "Paris, France"},
        {"label": "x", "choices": "yes/no"},
        {"label": "x", "choices": ["x", 3]},
        {"label": "x", "task": ["a"]},
        {"label": "x", "instructions": ["no_comma"]},
        {"label": "x", "unknown": "y"},
    ],
)
def test_fields_of_another_type_are_named(tmp_path, row):
    common = {"audio": "a.wav", "task": "t", "prompt": "What?", "metric": "text"}
    path = write(tmp_path / "q.jsonl", json.dumps(common | row) + "\n")
    with pytest.raises(DataError, match="line 1"):
        ask("jsonl", path, tmp_path)


def test_nulls_and_numbers_of_exported_lines(tmp_path):
    row = {"audio": "a.wav", "task": "t", "prompt": "How many?", "label": 3, "metric": "contains", "transcript": None}
    instructions = [{"id": "punctuation:no_comma"}]
    path = write(tmp_path / "q.jsonl", json.dumps(row | {"others": None, "instructions": instructions}) + "\n")
    (question,) = ask("jsonl", path, tmp_path)
    assert (question.label, question.transcript, question.others) == ("3", None, ())
    assert question.instructions == ({"id": "punctuation:no_comma", "kwargs": {}},)


def test_slots_that_are_not_filled_ask_nothing(tmp_path):
    path = write(tmp_path / "t.tsv", 'path\tslots\na.wav\t{"size": "large", "number": 2, "drink": null, "side": ""}\n')
    assert {(q.task, q.label) for q in ask("slots", path, tmp_path)} == {("size", "large"), ("number", "2")}


def test_a_quotation_mark_without_an_end_swallows_no_rows(tmp_path):
    path = write(tmp_path / "t.tsv", 'path\tslots\n"a.wav\t{}\nb.wav\t{}\n')
    with pytest.raises(DataError, match="quotation mark"):
        ask("slots", path, tmp_path)
    path.write_text('path\tslots\tremark\na.wav\t{"size": "large"}\t"two\nlines"\n')
    assert len(ask("slots", path, tmp_path)) == 1


def test_tables_may_have_another_encoding(tmp_path):
    (tmp_path / "t.tsv").write_bytes('path\tslots\na.wav\t{"city": "Köln"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="encoding"):
        ask("slots", tmp_path / "t.tsv", tmp_path)
    (question,) = ask("slots", tmp_path / "t.tsv", tmp_path, encoding="latin-1")
    assert question.label == "Köln"


def test_recordings_may_be_elsewhere(tmp_path):
    path = write(tmp_path / "lists/t.tsv", 'path\tslots\na.wav\t{"city": "Ulm"}\n')
    wav(tmp_path / "audio/a.wav")
    assert ask("slots", path, tmp_path, audio=str(tmp_path / "audio"))[0].audio.is_file()


def test_recordings_that_cannot_be_read_are_left_out(tmp_path, tiny_config, capsys):
    wav(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(b"no audio")
    rows = [{"audio": f"{n}.wav", "task": "t", "prompt": "What?", "label": "x"} for n in "abc"]
    path = write(tmp_path / "q.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = build(tiny_config).tokenizer.tokenizer
    cuts, _ = labelled_cuts("mine", {"kind": "jsonl", "path": str(path)}, tokenizer, 2, tmp_path)
    assert len(list(cuts)) == 1 and "2 recordings cannot be read" in capsys.readouterr().out
    (tmp_path / "a.wav").unlink()
    with pytest.raises(DataError, match="none of 3 recordings"):
        labelled_cuts("mine", {"kind": "jsonl", "path": str(path)}, tokenizer, 2, tmp_path)


def label_records(labels, answers, choices):
    return {
        str(i): {"utterance": str(i), "task": "key", "reference": label, "choice": answer, "answer": None}
        | {"choices": own, "metric": "accuracy", "language": "en"}
        for i, (label, answer, own) in enumerate(zip(labels, answers, choices, strict=True))
    }


def test_macro_f1_of_labels_that_begin_alike():
    chords = ["G", "G:maj", "C", "G:fp", "G:tp"]
    labels, answers = chords * 3, ["G", "C", "C", "G:fp", "G"] + chords * 2
    found = summarize_labels({"s": label_records(labels, answers, [chords] * 15)}, "none", 20)["s"]
    assert found["scores"]["f1_likelihood"]["value"] == pytest.approx(f1_score(labels, answers, average="macro"))


def test_questions_with_choices_of_their_own_have_no_f1():
    choices = [[f"{i} a", f"{i} b"] for i in range(12)]
    records = label_records([c[0] for c in choices], [c[i % 2] for i, c in enumerate(choices)], choices)
    found = summarize_labels({"s": records}, "none", 20)["s"]
    assert found["scores"]["accuracy_likelihood"]["value"] == 0.5 and "f1_likelihood" not in found["scores"]


def test_languages_of_lhotses_recipes():
    assert word_errors("I'm here", "I am here", "English") == (0.0, 3.0)
    assert word_errors("twenty one dogs", "21 dogs", "en_US")[0] == 0


def test_a_speakers_channel_alone_is_asked_about(tmp_path):
    samples = np.stack([np.full(8000, 0.5), np.full(8000, 0.1)], 1)
    soundfile.write(tmp_path / "two.wav", samples, 16000)
    recording = Recording.from_file(tmp_path / "two.wav")
    cuts = [
        MonoCut(
            id=f"c{channel}",
            start=0,
            duration=0.5,
            channel=channel,
            recording=recording,
            supervisions=[
                SupervisionSegment(
                    id=f"s{channel}",
                    recording_id="two",
                    start=0,
                    duration=0.5,
                    channel=channel,
                    text="hello",
                    custom={"description": {"gender": gender}},
                )
            ],
        )
        for channel, gender in ((0, "male"), (1, "female"))
    ]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    heard = {q.label: soundfile.read(q.audio)[0] for q in ask("voice", tmp_path / "cuts.jsonl", tmp_path / "own")}
    assert heard["male"].max() == pytest.approx(0.5, abs=0.01)
    assert heard["female"].max() == pytest.approx(0.1, abs=0.01)


def test_suffixes_in_capitals_and_copies(tmp_path):
    write(tmp_path / "cremad/VideoDemographics.csv", "ActorID,Age,Sex\n1001,51,Male\n")
    for name in ("1001_DFA_ANG_XX.wav", "1001_DFA_SAD_XX.WAV"):
        wav(tmp_path / "cremad/AudioWAV" / name)
    assert len(ask("cremad", tmp_path / "cremad", tmp_path, split="emotion")) == 2
    for folder in ("Actor_12", "copy/Actor_12"):
        wav(tmp_path / "ravdess" / folder / "03-01-06-01-02-01-12.wav")
    assert len(ask("ravdess", tmp_path / "ravdess", tmp_path, split="emotion")) == 1


def test_speakers_of_the_table_without_recordings_are_counted(tmp_path, capsys):
    table = "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\nid1\tA\tm\tUK\ttest\nid2\tB\tf\tUK\ttest\n"
    path = write(tmp_path / "vox1_meta.csv", table)
    wav(tmp_path / "wav/id1/video/1.WAV")
    assert len(ask("voxceleb", path, tmp_path)) == 1
    assert "1 speakers of the table have no recordings" in capsys.readouterr().out


def test_a_set_and_a_corpus_of_one_name_are_refused():
    from omegaconf import OmegaConf

    cfg = OmegaConf.create(
        {"systems": {"a": "b"}, "baseline": "cascade", "cascade": True, "compare_with": [], "no_speech": None}
        | {"normalized_cascade": False}
        | {"cuts": {"slurp": "x.jsonl"}, "labelled": {"slurp": {}}}
    )
    with pytest.raises(ConfigError, match="slurp is a name of both"):
        check_names(cfg)


def test_resampling_in_blocks_is_resampling_at_once():
    values = {str(i): (float(i % 7), float(1 + i % 3)) for i in range(30)}
    sums, bootstrap = Sums.of(values), Bootstrap(list(values), 2 * BLOCK + 7)
    at_once = bootstrap.weights @ sums.values
    np.testing.assert_allclose(bootstrap.scores(sums), at_once[:, 0] / at_once[:, 1])


def test_answers_of_before_go_when_there_are_new_ones(tmp_path):
    """Those to other questions stay: they may be asked again."""
    file = tmp_path / "set.jsonl"
    rows = [("a", "old"), ("b", "old"), ("a", "new"), ("a", "new")]
    file.write_text("".join(json.dumps({"id": i, "key": k, "n": n}) + "\n" for n, (i, k) in enumerate(rows)))
    newest_alone(file)
    assert [json.loads(line)["n"] for line in file.read_text().splitlines()] == [1, 2, 3]
