"""Readers of labelled corpora in the forms in which they are published.

| kind | path | recordings (default of ``audio``) |
| --- | --- | --- |
| ``librispeech`` | a folder with ``*.trans.txt`` (``test-clean``) | beside them, ``.flac`` |
| ``slurp`` | ``dataset/slurp/test.jsonl`` | ``audio/slurp_real`` of the same copy |
| ``minds14`` | ``text/en-US.csv``, or a parquet of PolyAI/minds14 | ``audio`` beside ``text``; inside the parquet |
| ``covost2`` | ``covost_v2.de_en.tsv`` beside Common Voice's ``validated.tsv`` | ``clips`` beside it |
| ``spoken_squad`` | ``spoken_test-v1.1.json`` | ``dev_wav`` beside it, a file for each sentence |
| ``voicebench`` | a parquet of hlt-lab/voicebench (``openbookqa``, ``mmsu``, ``sd-qa``, ``bbh``, ``ifeval``) | inside |
| ``speech_ifeval`` | ``data/eval_data/*.jsonl`` | ``audios`` beside ``eval_data`` |
| ``slots`` | a table of ``path`` and ``slots`` (JSON) | relative to the table |
| ``longspeech_eval`` | the JSON of ICTNLP/LongSpeech-Eval (``path``, ``question``, ``answer``) | relative to it |
| ``jsonl`` | lines with the fields of :class:`Question` | relative to the file |

Those about voices: :mod:`nemo_mtbi.evaluation.voice_corpora`.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemo_mtbi.data.audio import mono
from nemo_mtbi.errors import DataError
from nemo_mtbi.evaluation.corpus_tables import CHOICE_PROMPT, fill, folder_of, json_lines, tsv, words
from nemo_mtbi.evaluation.questions import METRICS, LabelledConfig, Question
from nemo_mtbi.evaluation.voice_corpora import VOICE_READERS
from nemo_mtbi.io.text import numbered_lines, read_text

LETTER, YES_NO = re.compile(r"\(?([A-J])\)?"), ("yes", "no")
SLOT_PROMPT = CHOICE_PROMPT.replace("{question}", "Which {slot} was ordered?")
PROMPTS = {
    "repeat": "Repeat what the speaker says, word for word.",
    "scenario": CHOICE_PROMPT.replace("{question}", "What is this request about?"),
    "intent": CHOICE_PROMPT.replace("{question}", "What does the speaker want?"),
    "translation": "Translate what the speaker says into {language}. Write nothing else.",
    "answer": "{question} Answer in a few words.",
    "letter": "Answer the spoken question with the letter of the right choice and nothing else: {choices}.",
    "yes_no": "Answer the spoken question with yes or no and nothing else.",
    "follow": "Do what the speaker asks.",
}


def read_librispeech(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Utterances with their transcripts: ``ID TEXT`` lines, ``ID.flac`` beside them."""
    root = Path(config.path)
    recordings = folder_of(config, root)
    for table in sorted(root.rglob("*.trans.txt")):
        for _, line in numbered_lines(table, config.encoding):
            name, _, text = line.partition(" ")
            audio = recordings / table.parent.relative_to(root) / f"{name}.flac"
            prompt, speaker = _prompt(config, "repeat"), name.split("-")[0]
            yield Question(audio, "repeat", prompt, text, "wer", transcript=text, speaker=speaker)


def read_slurp(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Scenario and intent of every recording of each sentence; the choices are those of the whole table."""
    path = Path(config.path)
    audio = folder_of(config, path.resolve().parent.parent.parent / "audio" / "slurp_real")
    rows = list(json_lines(path, config.encoding))
    tasks = {t: tuple(sorted({words(r[t]) for r in rows})) for t in ("scenario", "intent")}
    for row in rows:
        for recording in row["recordings"]:
            for task, choices in tasks.items():
                prompt = _prompt(config, task, choices=", ".join(choices))
                file, said = audio / recording["file"], row["sentence"]
                yield Question(file, task, prompt, words(row[task]), "accuracy", choices, said, group=said)


def read_minds14(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Intents in e-banking. CSV: a head, then file, transcript, English transcript, intent.

    The locale is the file's name.
    """
    path = Path(config.path)
    rows: list[tuple[Path, str, str]]
    if path.suffix == ".parquet":
        table = _parquet(path)
        names = table.features["intent_class"].names
        rows = [(_audio_of(r, folder, i), r["transcription"], names[r["intent_class"]]) for i, r in enumerate(table)]
        locale = path.parent.name
    else:
        audio = folder_of(config, path.resolve().parent.parent / "audio")
        lines = [
            line
            for line in csv.reader(io.StringIO(read_text(path, config.encoding), newline=""), skipinitialspace=True)
            if line
        ][1:]
        if any(len(line) != 4 for line in lines):
            raise DataError(
                f"{path}: a line of MINDS-14 has four fields (file, transcript, English transcript, intent)."
            )
        rows = [(audio / file, text, intent.lower()) for file, text, _, intent in lines]
        locale = path.stem
    choices = tuple(sorted({words(intent) for *_, intent in rows}))
    prompt = _prompt(config, "intent", choices=", ".join(choices))
    for file, text, intent in rows:
        yield Question(file, "intent", prompt, words(intent), "accuracy", choices, text, locale.split("-")[0])


def read_covost2(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Translations: columns path, translation, split; the transcripts are Common Voice's (path, sentence)."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    path = Path(config.path)
    try:
        source, target = path.stem.removeprefix("covost_v2.").split("_")
        language = LANGUAGES[target.split("-")[0].lower()].title()
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: the file's name gives the languages, as in covost_v2.de_en.tsv.") from error
    sentences = {}
    transcripts = path.parent / "validated.tsv"
    if transcripts.is_file():
        sentences = {r["path"]: r["sentence"] for r in tsv(transcripts, config.encoding, {"path", "sentence"}, **PLAIN)}
    audio, split = folder_of(config, path.parent / "clips"), config.split or "test"
    prompt = _prompt(config, "translation", language=language)
    for row in tsv(path, config.encoding, {"path", "translation", "split"}, **PLAIN):
        if row["split"] == split:
            yield Question(
                audio / row["path"],
                "translation",
                prompt,
                row["translation"],
                "translation",
                transcript=sentences.get(row["path"]),
                language=source,
                answer_language=target,
            )


def read_spoken_squad(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Questions about read paragraphs: SQuAD's JSON; sentence k of paragraph j of article i is ``i_j_k.wav``.

    A paragraph's sentences are joined into one recording under ``folder``. The JSON's text is a recognizer's, so
    there is no transcript.
    """
    path = Path(config.path)
    audio = folder_of(config, path.parent / "dev_wav")
    articles = json.loads(read_text(path, config.encoding))["data"]
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(article["paragraphs"]):
            questions = [q for q in paragraph["qas"] if q["answers"]]
            if not questions:
                continue
            parts = sorted(audio.glob(f"{i}_{j}_*.wav"), key=lambda p: int(p.stem.split("_")[2]))
            if not parts:
                raise DataError(f"{audio} holds no {i}_{j}_*.wav, the recordings of paragraph {j} of article {i}.")
            whole = _joined(parts, folder / f"{audio.resolve().as_posix().replace('/', '_')}_{i}_{j}.wav")
            for question in questions:
                answers = list(dict.fromkeys(a["text"] for a in question["answers"]))
                yield Question(
                    whole,
                    "answer",
                    _prompt(config, "answer", question=question["question"].strip()),
                    answers[0],
                    "answer",
                    others=tuple(answers[1:]),
                )


def read_longspeech_eval(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Questions about minutes of speech (FastLongSpeech): a list of objects with ``path``, ``question`` and ``answer``,
    which is a text or a list of right ones."""
    path = Path(config.path)
    audio = folder_of(config, path.parent)
    try:
        rows = json.loads(read_text(path, config.encoding))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}).") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if not isinstance(row, dict) or not all(row.get(key) for key in ("path", "question", "answer")):
            raise DataError(f"{path}, entry {number}: LongSpeech-Eval has path, question and answer.")
        answers = [str(a) for a in (row["answer"] if isinstance(row["answer"], list) else [row["answer"]])]
        prompt = _prompt(config, "answer", question=str(row["question"]).strip())
        yield Question(audio / str(row["path"]), "answer", prompt, answers[0], "answer", others=tuple(answers[1:]))


def read_voicebench(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Spoken instructions. Letters (``B`` or ``(B)``), yes and no are choices where all references are such ones;
    other references must stand in the answer; IFEval's instructions are checked. Subsets without either
    (``alpacaeval``, ``commoneval``, ``advbench``) need a judge and are refused."""
    path = Path(config.path)
    table = _parquet(path)
    if not {"reference", "instruction_id_list"} & set(table.column_names):
        raise DataError(
            f"{path}: this subset has no references; its answers are rated by an LLM, which is not done here."
        )
    references = [str(r or "") for r in table["reference"]] if "reference" in table.column_names else [""] * len(table)
    closed = all(LETTER.fullmatch(label) or label.lower() in YES_NO for label in references)
    letters = tuple(sorted({found[1] for found in map(LETTER.fullmatch, references) if found}))
    for index, (row, label) in enumerate(zip(table, references, strict=True)):
        choices: tuple[str, ...] = ()
        prompt = _prompt(config, "follow")
        if closed and (found := LETTER.fullmatch(label)):
            label, choices, prompt = found[1], letters, _prompt(config, "letter", choices=", ".join(letters))
        elif closed:
            label, choices, prompt = label.lower(), YES_NO, _prompt(config, "yes_no")
        metric = "accuracy" if choices else "contains" if label else "instructions"
        yield Question(
            _audio_of(row, folder, index),
            path.parent.name,
            prompt,
            label,
            metric,
            choices,
            row["prompt"],
            instructions=_instructions(row),
        )


def read_speech_ifeval(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Prompts with verifiable instructions about their answer's form; recognition is scored by WER, other labels must
    stand in the answer."""
    path = Path(config.path)
    audio = folder_of(config, path.parent.parent / "audios")
    for row in json_lines(path, config.encoding):
        label = str(row.get("label") or "")
        metric = "instructions" if not label else "wer" if row.get("metric") == "wer" else "contains"
        task = row.get("dataset") or path.stem
        yield Question(
            audio / row["audio_filepath"], task, row["instruction"], label, metric, instructions=_instructions(row)
        )


def read_slots(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Tab-separated table of ``path`` (relative to the table) and ``slots`` (JSON object): a question for each filled
    slot.

    The choices of a question are all values that its slot has in the table, so they do not depend on ``utterances``.
    """
    path = Path(config.path)
    root = folder_of(config, path.parent)
    rows = tsv(path, config.encoding, {"path", "slots"})
    slots = [{k: str(v) for k, v in json.loads(r["slots"]).items() if v not in (None, "")} for r in rows]
    choices: dict[str, set[str]] = {}
    for filled in slots:
        for name, value in filled.items():
            choices.setdefault(name, set()).add(value)
    for row, filled in zip(rows, slots, strict=True):
        for name, value in filled.items():
            options = tuple(sorted(choices[name]))
            prompt = fill(config.prompts.get(name, SLOT_PROMPT), slot=words(name), choices=", ".join(options))
            yield Question(root / row["path"], name, prompt, value, "accuracy", options)


def read_jsonl(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """JSON lines with the fields of :class:`Question`; ``audio`` is relative to the file."""
    path = Path(config.path)
    root = folder_of(config, path.parent)
    for number, line in numbered_lines(path, config.encoding):
        try:
            question = _question(json.loads(line), root)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}.") from error
        if question.metric not in METRICS or (question.metric == "accuracy") != bool(question.choices):
            raise DataError(
                f"{path}, line {number}: metric={question.metric!r} with {len(question.choices)} choices; "
                f"metrics are "
                f"{', '.join(METRICS)}, and accuracy needs choices (the others none)."
            )
        yield question


def _question(row: Any, root: Path) -> Question:
    """A question of a JSON line; what is null is as if it were absent.

    Raises:
        TypeError, KeyError: a field is absent, unknown, or of another type.
    """
    if not isinstance(row, dict):
        raise TypeError(f"it is a JSON {type(row).__name__}, not an object")
    row = {key: value for key, value in row.items() if value is not None}
    for key in LISTS:
        row[key] = _list_of(key, row.get(key, []))
    for key, value in row.items():
        if isinstance(value, int) and not isinstance(value, bool):
            row[key] = str(value)
        elif key not in LISTS and not isinstance(value, str):
            raise TypeError(f"{key} must be a text, not {value!r}")
    return Question(**row | {"audio": root / row["audio"]})


def _list_of(key: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or not all(isinstance(value, LISTS[key]) for value in values):
        raise TypeError(f"{key} must be a list of {'objects' if LISTS[key] is dict else 'texts'}, not {values!r}")
    if LISTS[key] is dict:
        values = [{"id": value["id"], "kwargs": value.get("kwargs") or {}} for value in values]
    return tuple(values)


LISTS: dict[str, type] = {"choices": str, "others": str, "instructions": dict}
PLAIN: dict[str, Any] = {
    "quoting": csv.QUOTE_NONE,
    "escapechar": "\\",
}  # quotation marks as they are, as CoVoST's own script reads them
READERS: dict[str, Callable[[LabelledConfig, Path], Iterator[Question]]] = {
    "librispeech": read_librispeech,
    "slurp": read_slurp,
    "minds14": read_minds14,
    "covost2": read_covost2,
    "spoken_squad": read_spoken_squad,
    "longspeech_eval": read_longspeech_eval,
    "voicebench": read_voicebench,
    "speech_ifeval": read_speech_ifeval,
    "slots": read_slots,
    "jsonl": read_jsonl,
    **VOICE_READERS,
}


def _prompt(config: LabelledConfig, task: str, **values: str) -> str:
    return fill(config.prompts.get(task, PROMPTS[task]), **values)


def _parquet(path: Path) -> Any:
    """A Hugging Face table whose audio stays as it is stored."""
    from datasets import Audio, Dataset

    table = Dataset.from_parquet(str(path))
    return table.cast_column("audio", Audio(decode=False))


def _audio_of(row: dict[str, Any], folder: Path, index: int) -> Path:
    """The recording that a parquet row holds, as a file."""
    name = Path(row["audio"].get("path") or f"{index}.wav").name
    path = folder / f"{index:06d}_{name}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(row["audio"]["bytes"])
        temporary.replace(path)
    return path


def _joined(parts: list[Path], path: Path) -> Path:
    """One WAV of several."""
    import soundfile

    if not path.is_file():
        read = [soundfile.read(p, dtype="float32", always_2d=True) for p in parts]
        if len({rate for _, rate in read}) != 1:
            raise DataError(f"{parts[0]} and its neighbours have different sampling rates.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        soundfile.write(temporary, np.concatenate([mono(w.T) for w, _ in read]), read[0][1], format="WAV")
        temporary.replace(path)
    return path


def _instructions(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """IFEval's instructions of a row; parameters that a table fills with null are left out."""
    ids, values = row.get("instruction_id_list") or [], row.get("kwargs") or []
    return tuple(
        {"id": i, "kwargs": {k: v for k, v in (own or {}).items() if v is not None}}
        for i, own in zip(ids, values, strict=True)
    )
