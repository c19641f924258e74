"""Corpora about voices, as small files in their published forms."""

import json

import pytest

from nemo_mtbi.errors import DataError
from nemo_mtbi.evaluation.corpora import READERS
from nemo_mtbi.evaluation.questions import LabelledConfig

pytestmark = pytest.mark.unit


def put(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def asked(kind, path, folder, **options):
    return list(READERS[kind](LabelledConfig(kind, str(path), **options), folder))


def labels(questions):
    assert all(q.metric == "accuracy" and q.label in q.choices for q in questions)
    assert all(choice in q.prompt for q in questions for choice in q.choices)
    return [(q.audio.name, q.task, q.label) for q in questions]


def test_cremad(tmp_path):
    put(tmp_path / "VideoDemographics.csv", "ActorID,Age,Sex,Race,Ethnicity\n1001,51,Male,Caucasian,Not Hispanic\n")
    put(tmp_path / "AudioWAV" / "1001_DFA_ANG_XX.wav")
    questions = asked("cremad", tmp_path, tmp_path)
    assert labels(questions) == [
        ("1001_DFA_ANG_XX.wav", "emotion", "angry"),
        ("1001_DFA_ANG_XX.wav", "gender", "male"),
    ]
    assert questions[0].transcript == "Don't forget a jacket." and len(questions[0].choices) == 6
    assert [q.task for q in asked("cremad", tmp_path, tmp_path, split="gender")] == ["gender"]
    with pytest.raises(DataError, match="'mood' is none of emotion, gender"):
        asked("cremad", tmp_path, tmp_path, split="mood")
    put(tmp_path / "AudioWAV" / "1002_DFA_ANG_XX.wav")  # not in the table
    with pytest.raises(DataError, match=r"1002_DFA_ANG_XX.wav: CREMA-D's names"):
        asked("cremad", tmp_path, tmp_path)


def test_ravdess(tmp_path):
    put(tmp_path / "Actor_12" / "03-01-06-01-02-01-12.wav")
    put(tmp_path / "Actor_11" / "03-01-08-02-01-01-11.wav")
    put(tmp_path / "Actor_11" / "03-02-03-02-01-01-11.wav")  # a song
    questions = asked("ravdess", tmp_path, tmp_path)
    assert labels(questions) == [
        ("03-01-08-02-01-01-11.wav", "emotion", "surprised"),
        ("03-01-08-02-01-01-11.wav", "gender", "male"),
        ("03-01-06-01-02-01-12.wav", "emotion", "afraid"),
        ("03-01-06-01-02-01-12.wav", "gender", "female"),
    ]
    assert questions[-1].transcript == "Dogs are sitting by the door."
    put(tmp_path / "Actor_11" / "03-01-99-02-01-01-11.wav")
    with pytest.raises(DataError, match="seven numbers"):
        asked("ravdess", tmp_path, tmp_path)
    with pytest.raises(DataError, match="no recording of RAVDESS"):
        asked("ravdess", put(tmp_path / "empty" / "list.txt").parent, tmp_path)


def test_iemocap(tmp_path):
    dialog = tmp_path / "Session1" / "dialog"
    lines = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    for begin, turn, emotion in ((6.29, "F000", "neu"), (10.01, "M000", "exc"), (14.8, "F001", "xxx")):
        lines += f"[{begin} - {begin + 2}]\tSes01F_impro01_{turn}\t{emotion}\t[2.5000, 2.5000, 2.5000]\n"
        lines += "C-E2:\tNeutral;\t()\n"
    put(dialog / "EmoEvaluation" / "Ses01F_impro01.txt", lines)
    put(dialog / "transcriptions" / "Ses01F_impro01.txt", "Ses01F_impro01_F000 [006.2900-008.2900]: Excuse me.\n")
    questions = asked("iemocap", tmp_path, tmp_path)
    assert labels(questions) == [
        ("Ses01F_impro01_F000.wav", "emotion", "neutral"),
        ("Ses01F_impro01_F000.wav", "gender", "female"),
        ("Ses01F_impro01_M000.wav", "emotion", "happy"),
        ("Ses01F_impro01_M000.wav", "gender", "male"),
    ]
    assert questions[0].transcript == "Excuse me." and questions[2].transcript is None
    assert questions[0].audio.parent == tmp_path / "Session1" / "sentences" / "wav" / "Ses01F_impro01"
    assert questions[0].choices == ("angry", "happy", "sad", "neutral")


@pytest.mark.parametrize(("separator", "folder"), [("\t", "wav"), (" ,", "test/aac")])
def test_voxceleb(tmp_path, separator, folder):
    rows = [("VoxCeleb ID", "VGGFace ID", "Gender", "Set"), ("id10001", "A.J._Buckley", "m", "dev")]
    rows += [("id10270", "Eartha_Kitt", "f", "test"), ("id10271", "Nobody", "f", "test")]
    table = put(tmp_path / "meta.csv", "".join(separator.join(row) + " \n" for row in rows))
    for speaker in ("id10001", "id10270"):
        put(tmp_path / folder / speaker / "5r0dWxy17C8" / "00001.wav")
    assert [(q.audio.parts[-3], q.label) for q in asked("voxceleb", table, tmp_path)] == [
        ("id10001", "male"),
        ("id10270", "female"),
    ]
    assert labels(asked("voxceleb", table, tmp_path, split="test")) == [("00001.wav", "gender", "female")]
    with pytest.raises(DataError, match="none of .*set audio"):
        asked("voxceleb", put(tmp_path / "elsewhere" / "meta.csv", table.read_text()), tmp_path)


def test_air_bench(tmp_path):
    row = {"path": "a.wav", "question": "Is it a man?", "task_name": "Speaker_Gender_Recognition", "dataset_name": "cv"}
    row |= {"choice_a": "male", "choice_b": "female", "choice_c": "", "choice_d": None, "answer_gt": "female"}
    other = {**row, "path": "b.wav", "task_name": "Audio_Grounding", "choice_c": "neither", "answer_gt": "neither"}
    table = put(tmp_path / "Foundation_meta.json", json.dumps([row, other]))
    questions = asked("air_bench", table, tmp_path)
    assert labels(questions) == [
        ("a.wav", "Speaker_Gender_Recognition", "female"),
        ("b.flac", "Audio_Grounding", "neither"),
    ]
    assert questions[0].audio.parent.name == "Speaker_Gender_Recognition_cv"
    assert len(asked("air_bench", table, tmp_path, split="Audio_Grounding")) == 1
    put(table, json.dumps([{**row, "answer_gt": "nobody"}]))
    assert asked("air_bench", table, tmp_path) == []  # its answer is none of the choices


def test_mmau(tmp_path):
    row = {"audio_id": "./audios/a.wav", "question": "Who speaks?", "choices": ["Man", "Woman"], "answer": "Man"}
    rows = [{**row, "task": "speech", "sub-category": "Speaker Identification"}, {**row, "task": "music"}]
    table = put(tmp_path / "mmau-test-mini.json", json.dumps(rows))
    (question,) = asked("mmau", table, tmp_path)
    assert labels([question]) == [("a.wav", "Speaker Identification", "Man")]
    assert question.audio == tmp_path / "audios" / "a.wav"
    assert len(asked("mmau", table, tmp_path, split="speech, music")) == 2
    for broken, message in (("[{}]", "entry 0: it needs audio_id"), ("{", "is no JSON")):
        with pytest.raises(DataError, match=message):
            asked("mmau", put(table, broken), tmp_path)
