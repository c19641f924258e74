"""Readers of corpora whose labels are about the voice, in the forms in which they are published.

| kind | path | asks |
| --- | --- | --- |
| ``voice`` | a manifest of ``mtbi prepare describe.enabled=true`` | each attribute |
| ``cremad`` | a copy of CREMA-D: ``AudioWAV``, ``VideoDemographics.csv`` | emotion, gender |
| ``ravdess`` | RAVDESS, speech: ``Actor_01`` to ``Actor_24`` | emotion, gender |
| ``iemocap`` | IEMOCAP: ``Session1`` to ``Session5`` | emotion (of four classes, excitement is happiness), gender |
| ``voxceleb`` | ``vox1_meta.csv`` or ``vox2_meta.csv`` beside ``wav`` (``dev/aac``, ``test/aac``) | gender |
| ``air_bench`` | ``Foundation_meta.json`` of AIR-Bench beside its folders | its questions of four choices |
| ``mmau`` | ``mmau-test-mini.json`` | its questions |

``split``: of ``voice``, ``cremad``, ``ravdess`` and ``iemocap`` the attributes to ask for, of ``voxceleb`` the set
(``dev``, ``test``), of ``air_bench`` task names, of ``mmau`` its ``task`` (default: ``speech``); several with commas.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut

from nemo_mtbi import console
from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.description import DescribedText, labels_of
from nemo_mtbi.errors import DataError
from nemo_mtbi.evaluation.corpus_tables import CHOICE_PROMPT, fill, folder_of
from nemo_mtbi.evaluation.questions import LabelledConfig, Question
from nemo_mtbi.io.text import read_text
from nemo_mtbi.tasks.library import load_library, render_template

PROMPTS = {
    "emotion": CHOICE_PROMPT.replace("{question}", "How does the speaker feel?"),
    "gender": CHOICE_PROMPT.replace("{question}", "What is the speaker's gender?"),
    "question": CHOICE_PROMPT,
}
GENDERS = ("male", "female")
CREMAD_EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgusted",
    "FEA": "afraid",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
CREMAD_SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "afraid", "disgusted", "surprised")
RAVDESS_SENTENCES = ("Kids are talking by the door.", "Dogs are sitting by the door.")
IEMOCAP_EMOTIONS = {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"}
IEMOCAP_LINE = re.compile(r"^\[[\d.]+ - [\d.]+\]\s+(\S+)\s+(\w{3})\s", re.MULTILINE)
IEMOCAP_WORDS = re.compile(r"^(\S+) \[[\d.]+-[\d.]+\]: (.*)$", re.MULTILINE)


def read_voice(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """What a described manifest says of each voice: the held-out wordings of the tasks that ask for one attribute.

    ``split`` names the attributes (comma-separated; default: all that a task asks for). The text topline reads the
    description; without it, the transcripts are given as they are under ``prompts: {described: ""}``.
    ``per_label`` balances the labels. Of a recording of several people only what holds for all of them is asked.
    """
    tasks = [t for t in load_library().values() if len(t.needs) == 1 and t.choices]
    wanted = _asked(config, tuple(t.needs[0] for t in tasks))
    described = None if config.prompts.get("described") == "" else DescribedText(least=99)
    cuts = sorted(CutSet.from_file(config.path), key=lambda cut: _number(cut.id)) if config.per_label else None
    counts = Counter[tuple[str, str]]()
    for cut in CutSet.from_file(config.path) if cuts is None else cuts:
        known = _agreed(cut.supervisions)
        labels = [(t, str(known.get(t.needs[0]))) for t in tasks if t.needs[0] in wanted]
        for task, label in labels:
            counts[task.needs[0], label] += label in task.choices
        due = [
            (task, label)
            for task, label in labels
            if label in task.choices and (not config.per_label or counts[task.needs[0], label] <= config.per_label)
        ]
        if not due:
            continue
        read = described(cut, cut.id) if described else None
        text, audio = transcript(cut) if read is None else read.text, _file_of(cut, folder)
        for task, label in due:
            wordings = task.select("held_out")
            wording = wordings[_number(cut.id) % len(wordings)]
            prompt = render_template(config.prompts.get(task.needs[0], wording.text), {"choices": task.choices})
            speaker = cut.supervisions[0].speaker
            yield Question(audio, task.needs[0], prompt, label, "accuracy", tuple(task.choices), text, speaker=speaker)


def _agreed(supervisions: list[Any]) -> dict[str, Any]:
    """Labels that all who speak have."""
    own = [labels_of(s) for s in supervisions if (s.text or "").strip()]
    return {name: label for name, label in own[0].items() if all(o.get(name) == label for o in own)} if own else {}


def _number(cut_id: str) -> int:
    return int(hashlib.blake2b(cut_id.encode(), digest_size=4).hexdigest(), 16)


def _file_of(cut: Cut, folder: Path) -> Path:
    """The recording of a cut; a file of its own where the cut is a part of it."""
    recording = cut.recording
    whole = cut.start == 0 and abs(cut.duration - recording.duration) < 0.01 and len(recording.sources) == 1
    whole = whole and recording.num_channels == 1  # of several, a cut has one speaker's
    if whole and recording.sources[0].type == "file" and not recording.transforms:
        return Path(recording.sources[0].source)
    path = folder / f"{hashlib.blake2b(cut.id.encode(), digest_size=12).hexdigest()}.flac"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"part-{path.name}")
        try:
            cut.save_audio(str(temporary))
        except (OSError, AudioLoadingError):  # who asks about it finds no file, and counts it
            return path
        temporary.replace(path)
    return path


def _asked(config: LabelledConfig, known: tuple[str, ...]) -> list[str]:
    """The names in ``split``, all of ``known`` by default."""
    asked = [name.strip() for name in config.split.split(",")] if config.split else list(known)
    if unknown := sorted(set(asked) - set(known)):
        raise DataError(f"split={config.split!r}: {unknown[0]!r} is none of {', '.join(known)}.")
    return asked


def _about(
    config: LabelledConfig,
    audio: Path,
    speaker: str,
    labels: dict[str, tuple[str, tuple[str, ...]]],
    text: str | None = None,
) -> Iterator[Question]:
    """Questions about one recording: of each attribute its label and choices."""
    for name in _asked(config, tuple(labels)):
        label, choices = labels[name]
        prompt = fill(config.prompts.get(name, PROMPTS[name]), choices=", ".join(choices))
        yield Question(audio, name, prompt, label, "accuracy", choices, text, speaker=speaker)


def _recordings(files: Iterable[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Of some files, the recordings (``.WAV`` too), sorted."""
    return sorted(file for file in files if file.suffix.lower() in suffixes)


def _some(files: list[Path], where: str) -> list[Path]:
    if not files:
        raise DataError(f"There is no {where}.")
    return files


def read_cremad(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """``1001_DFA_ANG_XX.wav``: actor, sentence, emotion, intensity; the actors' sex is in a table."""
    root = Path(config.path)
    audio = folder_of(config, root / "AudioWAV")
    table = csv.DictReader(io.StringIO(read_text(root / "VideoDemographics.csv", config.encoding), newline=""))
    sexes = {row["ActorID"].strip(): row["Sex"].strip().lower() for row in table}
    emotions = tuple(CREMAD_EMOTIONS.values())
    for file in _some(_recordings(audio.iterdir(), (".wav",)), f"recording in {audio}"):
        actor, sentence, emotion, *_ = [*file.stem.split("_"), "", "", ""]
        if emotion not in CREMAD_EMOTIONS or actor not in sexes:
            raise DataError(f"{file}: CREMA-D's names are ACTOR_SENTENCE_EMOTION_LEVEL.wav, with actors of the table.")
        labels = {"emotion": (CREMAD_EMOTIONS[emotion], emotions), "gender": (sexes[actor], GENDERS)}
        yield from _about(config, file, actor, labels, CREMAD_SENTENCES.get(sentence))


def read_ravdess(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """``03-01-06-01-02-01-12.wav``: modality, channel (01 speech), emotion, intensity, sentence, repetition, actor (odd
    ones are men); songs and videos are left out."""
    root = folder_of(config, Path(config.path))
    found = {
        file.stem: file for file in _recordings(root.rglob("*-*-*-*-*-*-*.*"), (".wav",))
    }  # a copy is no other one
    for file in _some(list(found.values()), f"recording of RAVDESS in {root}"):
        try:
            _, channel, emotion, _, sentence, _, actor = (int(part) for part in file.stem.split("-"))
            labels = {
                "emotion": (RAVDESS_EMOTIONS[emotion - 1], RAVDESS_EMOTIONS),
                "gender": (GENDERS[(actor + 1) % 2], GENDERS),
            }
            text = RAVDESS_SENTENCES[sentence - 1]
        except (ValueError, IndexError):
            raise DataError(f"{file}: RAVDESS's names are seven numbers, such as 03-01-06-01-02-01-12.wav.") from None
        if channel == 1:
            yield from _about(config, file, str(actor), labels, text)


def read_iemocap(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """The evaluations of each dialog, and its transcripts; turns of other emotions are left out."""
    root = Path(config.path)
    tables = sorted(root.glob("Session*/dialog/EmoEvaluation/Ses*.txt"))
    emotions = tuple(dict.fromkeys(IEMOCAP_EMOTIONS.values()))
    for table in _some(tables, f"Session*/dialog/EmoEvaluation/Ses*.txt in {root}"):
        session, dialog = table.parents[2], table.stem
        words = session / "dialog" / "transcriptions" / table.name
        texts = dict(IEMOCAP_WORDS.findall(read_text(words, config.encoding))) if words.is_file() else {}
        for turn, emotion in IEMOCAP_LINE.findall(read_text(table, config.encoding)):
            if emotion not in IEMOCAP_EMOTIONS:
                continue
            gender = GENDERS[turn.rsplit("_", 1)[-1].startswith("F")]
            labels = {"emotion": (IEMOCAP_EMOTIONS[emotion], emotions), "gender": (gender, GENDERS)}
            audio = session / "sentences" / "wav" / dialog / f"{turn}.wav"
            speaker = f"{dialog[:5]}{turn.rsplit('_', 1)[-1][:1]}"  # a session has two: Ses01F, Ses01M
            yield from _about(config, audio, speaker, labels, (texts.get(turn) or "").strip() or None)


def read_voxceleb(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """A table of speakers with tabs (VoxCeleb1) or commas (2); each speaker's recordings are in folders of videos."""
    path = Path(config.path)
    lines = [
        re.split(r"\s*[\t,]\s*", line.strip()) for line in read_text(path, config.encoding).splitlines() if line.strip()
    ]
    head = [name.casefold() for name in lines[0]] if lines else []
    if not {"gender", "set"} <= set(head):
        raise DataError(f"{path}: VoxCeleb's table begins with the names of its columns, Gender and Set among them.")
    sets = {line[head.index("set")] for line in lines[1:]}
    asked = _asked(config, tuple(sorted(sets)))
    places = [path.parent / name for name in ("wav", "dev/aac", "test/aac")]
    roots = [Path(config.audio)] if config.audio else [place for place in places if place.is_dir()]
    if not roots:
        raise DataError(f"There is none of {', '.join(map(str, places))} with the recordings of {path}; set audio.")
    absent = 0
    for line in lines[1:]:
        speaker, own = line[0], dict(zip(head, line, strict=False))
        if own["set"] not in asked:
            continue
        gender = {"m": "male", "f": "female"}[own["gender"].casefold()]
        files = [f for root in roots for f in _recordings((root / speaker).rglob("*"), (".wav", ".m4a", ".flac"))]
        absent += not files
        for file in files:
            own_config = LabelledConfig("", "", prompts=config.prompts)
            yield from _about(own_config, file, speaker, {"gender": (gender, GENDERS)})
    if absent:
        console.say(f"{path}: {absent} speakers of the table have no recordings in {', '.join(map(str, roots))}.")


def read_air_bench(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Foundation questions: the recordings of a task and a corpus are in a folder ``TASK_CORPUS``."""
    path = Path(config.path)
    root = folder_of(config, path.parent)
    rows = _entries(path, config.encoding, ("path", "question", "answer_gt", "task_name", "dataset_name"))
    asked = _asked(config, tuple(sorted({row["task_name"] for row in rows})))

    def question(row: dict[str, Any]) -> Question | None:
        choices = [row.get(f"choice_{letter}") for letter in "abcd"]
        name = row["path"] if row["task_name"] != "Audio_Grounding" else f"{row['path'][:-3]}flac"
        audio = root / f"{row['task_name']}_{row['dataset_name']}" / name
        return _chosen(config, audio, row["task_name"], row["question"], choices, row["answer_gt"])

    yield from _with_choices(path, (question(row) for row in rows if row["task_name"] in asked))


def read_mmau(config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """Questions about speech, sound and music; recordings are named relative to the table. Entries whose answer is none
    of their choices (the published files have some) are left out."""
    path = Path(config.path)
    root = folder_of(config, path.parent)
    rows = _entries(path, config.encoding, ("audio_id", "question", "choices", "answer", "task"))
    asked = _asked(config, tuple(sorted({row["task"] for row in rows}))) if config.split else ["speech"]

    def question(row: dict[str, Any]) -> Question | None:
        task = row.get("sub-category") or row["task"]
        return _chosen(config, root / row["audio_id"], task, row["question"], row["choices"], row["answer"])

    yield from _with_choices(path, (question(row) for row in rows if row["task"] in asked))


def _chosen(
    config: LabelledConfig, audio: Path, task: str, question: str, choices: list[Any], answer: Any
) -> Question | None:
    """None where the answer is none of the choices, or several."""
    choices = list(dict.fromkeys(str(c).strip() for c in choices if c not in (None, "")))
    matching = [c for c in choices if c == str(answer).strip()] or [c for c in choices if _bare(c) == _bare(answer)]
    if len(matching) != 1:
        return None
    template = config.prompts.get(task, PROMPTS["question"])
    prompt = fill(template, question=question.strip(), choices=", ".join(choices))
    return Question(audio, task, prompt, matching[0], "accuracy", tuple(choices))


def _bare(choice: Any) -> str:
    """``(B) C major.`` -> ``c major``: the published answers are often written otherwise than the choices."""
    return re.sub(r"^\([A-Za-z]\)\s*", "", str(choice).strip()).strip(" .,;:!?\"'").casefold()


def _with_choices(path: Path, questions: Iterable[Question | None]) -> Iterator[Question]:
    """Those whose answer is one of their choices; how many are not is said."""
    without = 0
    for question in questions:
        if question is None:
            without += 1
        else:
            yield question
    if without:
        console.say(f"{path}: {without} questions are left out: their answer is none of their choices.")


def _entries(path: Path, encoding: str | None, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        rows = json.loads(read_text(path, encoding))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}).") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if not isinstance(row, dict) or any(not row.get(key) for key in needed):
            raise DataError(f"{path}, entry {number}: it needs {', '.join(needed)}.")
    return list(rows)


VOICE_READERS: dict[str, Callable[[LabelledConfig, Path], Iterator[Question]]] = {
    "voice": read_voice,
    "cremad": read_cremad,
    "ravdess": read_ravdess,
    "iemocap": read_iemocap,
    "voxceleb": read_voxceleb,
    "air_bench": read_air_bench,
    "mmau": read_mmau,
}
