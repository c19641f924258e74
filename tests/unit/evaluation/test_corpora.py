"""Readers of published corpora, on small files in their formats."""

import json

import numpy as np
import pytest
import sacrebleu
import soundfile
from sklearn.metrics import f1_score

from nemo_mtbi.errors import DataError
from nemo_mtbi.evaluation.corpora import READERS
from nemo_mtbi.evaluation.labelled import label_measures, letter_of
from nemo_mtbi.evaluation.questions import LabelledConfig
from nemo_mtbi.evaluation.summary import entries

pytestmark = pytest.mark.unit


def wav(path, seconds=0.5):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.ones(int(16000 * seconds)), 16000, format=path.suffix[1:].upper())
    return path


def ask(kind, path, folder, **options):
    return list(READERS[kind](LabelledConfig(kind, str(path), **options), folder))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def voicebench(folder, subset, *rows):
    from datasets import Dataset

    source = wav(folder / "source.wav")
    path = folder / subset / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    Dataset.from_list([{"audio": {"bytes": source.read_bytes(), "path": "q.wav"}, **row} for row in rows]).to_parquet(
        str(path)
    )
    return path


def scored(rows):
    records = {str(i): {"utterance": str(i // 2), "task": "t", **row} for i, row in enumerate(rows)}
    return entries({"system": {i: (r, label_measures(r)) for i, r in records.items()}}, "none", 20)["system"]["scores"]


def test_librispeech(tmp_path):
    wav(tmp_path / "test-clean/84/12/84-12-0000.flac")
    write(tmp_path / "test-clean/84/12/84-12.trans.txt", "84-12-0000 GO ON SAID THE MAN\n")
    (question,) = ask("librispeech", tmp_path / "test-clean", tmp_path)
    assert question.audio.is_file() and question.label == question.transcript == "GO ON SAID THE MAN"
    row = {
        "reference": question.label,
        "answer": "Go on, said a man.",
        "choices": [],
        "metric": "wer",
        "language": "en",
    }
    assert label_measures(row) == {"wer": (1.0, 5.0)}


def test_slurp(tmp_path):
    recordings = [
        {"file": "audio-1-headset.flac", "wer": 0.0, "ent_wer": 0.0, "status": "correct"},
        {"file": "audio-1.flac"},
    ]
    rows = [
        {
            "slurp_id": 1,
            "sentence": "wake me at eight",
            "intent": "alarm_set",
            "action": "set",
            "scenario": "alarm",
            "recordings": recordings,
            "entities": [{"span": [3], "type": "time"}],
        },
        {"slurp_id": 2, "sentence": "play it", "intent": "play_music", "scenario": "play", "recordings": []},
    ]
    path = write(tmp_path / "dataset/slurp/test.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(DataError, match="no folder .*slurp_real"):
        ask("slurp", path, tmp_path)
    wav(tmp_path / "audio/slurp_real/audio-1-headset.flac")
    questions = ask("slurp", path, tmp_path)
    assert [(q.task, q.label, q.audio.name) for q in questions] == [
        ("scenario", "alarm", "audio-1-headset.flac"),
        ("intent", "alarm set", "audio-1-headset.flac"),
        ("scenario", "alarm", "audio-1.flac"),
        ("intent", "alarm set", "audio-1.flac"),
    ]
    assert questions[1].choices == ("alarm set", "play music") and "alarm set, play music" in questions[1].prompt


def test_minds14_as_csv_and_as_parquet(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    audio = wav(tmp_path / "MInDS-14/audio/de-DE~BALANCE/a.wav")
    head = "filepath,text_asr,text_translated,intent_class\n"
    path = write(
        tmp_path / "MInDS-14/text/de-DE.csv", head + 'de-DE~BALANCE/a.wav,"Hallo, wie viel","hello, how much",BALANCE\n'
    )
    (question,) = ask("minds14", path, tmp_path)
    assert (question.audio, question.label, question.language) == (audio, "balance", "de")
    assert question.transcript == "Hallo, wie viel"
    features = Features(
        {
            "path": Value("string"),
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "transcription": Value("string"),
            "intent_class": ClassLabel(names=["abroad", "cash_deposit"]),
        }
    )
    row = {
        "path": "x",
        "audio": {"bytes": audio.read_bytes(), "path": "a.wav"},
        "transcription": "hi",
        "intent_class": 1,
    }
    table = tmp_path / "en-US/train-00000-of-00001.parquet"
    table.parent.mkdir()
    Dataset.from_list([row], features).to_parquet(str(table))
    (question,) = ask("minds14", table, tmp_path / "out")
    assert (question.label, question.language) == ("cash deposit", "en")
    assert question.audio.read_bytes() == audio.read_bytes()


def test_covost2(tmp_path):
    wav(tmp_path / "clips/a.mp3")
    write(tmp_path / "validated.tsv", 'client_id\tpath\tsentence\n1\ta.mp3\tSie sagte "gut\n')
    path = write(
        tmp_path / "covost_v2.de_en.tsv", 'path\ttranslation\tsplit\na.mp3\tShe said "good\ttest\nb.mp3\tNo.\ttrain\n'
    )
    (question,) = ask("covost2", path, tmp_path)
    assert question.prompt == "Translate what the speaker says into English. Write nothing else."
    assert (question.label, question.transcript) == ('She said "good', 'Sie sagte "gut')
    assert (question.language, question.answer_language) == ("de", "en")
    with pytest.raises(DataError, match="covost_v2.de_en.tsv"):
        ask("covost2", write(tmp_path / "mine.tsv", "path\n"), tmp_path)


def test_spoken_squad_joins_the_sentences_of_a_paragraph(tmp_path):
    for name, seconds in (("0_0_0", 0.25), ("0_0_10", 0.5), ("0_0_2", 0.25)):
        wav(tmp_path / f"dev_wav/{name}.wav", seconds)
    answers = [
        {"text": "the cat", "answer_start": 0},
        {"text": "a cat", "answer_start": 0},
        {"text": "the cat", "answer_start": 0},
    ]
    paragraph = {"context": "the cat sat", "qas": [{"id": "1", "question": "Who {sat}? ", "answers": answers}]}
    path = write(tmp_path / "spoken_test-v1.1.json", json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    (question,) = ask("spoken_squad", path, tmp_path / "out")
    assert question.prompt == "Who {sat}? Answer in a few words." and question.others == ("a cat",)
    assert question.transcript is None
    assert soundfile.info(question.audio).frames == 16000
    row = {"reference": "the cat", "others": ["a dog"], "choices": [], "metric": "answer", "language": "en"}
    assert label_measures({**row, "answer": "Cat."})["exact_match"] == (1.0, 1)
    assert label_measures({**row, "answer": "big dog"})["answer_f1"][0] == pytest.approx(2 / 3)


def test_longspeech_eval(tmp_path):
    wav(tmp_path / "audio/1.wav")
    rows = [
        {"path": "audio/1.wav", "question": "Where was {she}? ", "answer": ["In Rome", "Rome"]},
        {"path": "audio/1.wav", "question": "Who?", "answer": 7},
    ]
    path = write(tmp_path / "long.json", json.dumps(rows))
    first, second = ask("longspeech_eval", path, tmp_path / "out")
    assert first.audio.is_file() and first.prompt == "Where was {she}? Answer in a few words."
    assert (first.label, first.others, first.metric, second.label) == ("In Rome", ("Rome",), "answer", "7")
    for text, message in (
        ('[{"path": "a.wav"}]', "entry 0: LongSpeech-Eval has"),
        ("[", "no JSON"),
        ("[3]", "entry 0"),
    ):
        with pytest.raises(DataError, match=message):
            ask("longspeech_eval", write(tmp_path / "wrong.json", text), tmp_path)


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("a mammal", None),
        ("B. It is a mammal", "B"),
        ("(C) because", "C"),
        ("The answer is B, a plant.", "B"),
        ("It is a mammal.", None),
        ("A mammal.", None),
        ("A", "A"),
        ("I think it is D", "D"),
        ("B or C", None),
    ],
)
def test_letters_are_not_articles(answer, letter):
    assert letter_of(answer, list("ABCD")) == letter


def test_voicebench(tmp_path):
    path = voicebench(tmp_path, "openbookqa", {"prompt": "Which? A one B two", "reference": "B"})
    (question,) = ask("voicebench", path, tmp_path / "out")
    assert (question.task, question.metric, question.choices) == ("openbookqa", "accuracy", ("B",))
    path = voicebench(tmp_path, "sd-qa", {"prompt": "How many legs?", "reference": "four legs"})
    (question,) = ask("voicebench", path, tmp_path / "out2")
    row = {"reference": "four legs", "choices": [], "metric": question.metric, "language": "en"}
    assert label_measures({**row, "answer": "It has FOUR legs."}) == {"contains_label": (1.0, 1.0)}
    assert label_measures({**row, "answer": "Fourteen legs."}) == {"contains_label": (0.0, 1.0)}
    ifeval = {"key": 1, "prompt": "Answer in lower case.", "instruction_id_list": ["change_case:english_lowercase"]}
    path = voicebench(tmp_path, "ifeval", ifeval | {"kwargs": [{"num_words": None}]})
    (question,) = ask("voicebench", path, tmp_path / "out3")
    row = {"reference": "", "choices": [], "metric": question.metric, "language": "en", "prompt": question.prompt}
    row["instructions"] = list(question.instructions)
    sentence = "this is the answer that was asked for, in plain words"
    assert label_measures({**row, "answer": sentence}) == {"instructions": (1.0, 1), "prompts": (1.0, 1)}
    assert label_measures({**row, "answer": sentence.upper()}) == {"instructions": (0.0, 1), "prompts": (0.0, 1)}
    with pytest.raises(DataError, match="no references"):
        ask("voicebench", voicebench(tmp_path, "alpacaeval", {"prompt": "Hello"}), tmp_path)


def test_speech_ifeval(tmp_path):
    wav(tmp_path / "data/audios/Gender_recognition/a.wav")
    row = {
        "id": 0,
        "audio_filepath": "Gender_recognition/a.wav",
        "instruction": "Who speaks?",
        "dataset": "Gender_recognition",
        "metric": "accuracy",
        "instruction_id_list": ["startend:quotation"],
        "kwargs": [{}],
        "label": "female",
    }
    path = write(tmp_path / "data/eval_data/closed_ended_questions.jsonl", json.dumps(row) + "\n")
    (question,) = ask("speech_ifeval", path, tmp_path)
    assert question.audio.is_file() and (question.task, question.metric) == ("Gender_recognition", "contains")
    record = {"reference": "female", "choices": [], "metric": "contains", "language": "en", "prompt": "Who speaks?"}
    found = label_measures({**record, "answer": '"It is a female."', "instructions": list(question.instructions)})
    assert found == {"contains_label": (1.0, 1.0), "instructions": (1.0, 1), "prompts": (1.0, 1)}


def test_macro_f1_is_scikit_learns():
    labels, answers = list("aabbccab" * 3), list("abbbcaab" * 3)
    rows = [
        {
            "reference": label,
            "answer": answer,
            "choice": answer,
            "choices": list("abc"),
            "metric": "accuracy",
            "language": "en",
        }
        for label, answer in zip(labels, answers, strict=True)
    ]
    scores = scored(rows)
    assert scores["f1_likelihood"]["value"] == pytest.approx(f1_score(labels, answers, average="macro"))
    assert scores["f1_likelihood"]["low"] <= scores["f1_likelihood"]["value"] <= scores["f1_likelihood"]["high"]


def test_bleu_is_sacrebleus_of_the_corpus():
    references = ["the cat sat on the mat", "a dog barked at the cat loudly", "nothing else happened that day"]
    answers = ["the cat sat on a mat", "a dog barked at the cat", "that day nothing happened"]
    rows = [
        {"reference": r, "answer": a, "choices": [], "metric": "translation", "language": "de", "answer_language": "en"}
        for r, a in zip(references, answers, strict=True)
    ]
    expected = sacrebleu.corpus_bleu(answers, [references]).score / 100
    assert scored(rows)["bleu"]["value"] == pytest.approx(expected)
