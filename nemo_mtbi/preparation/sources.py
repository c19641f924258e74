"""Where utterances come from; every source is a stream of :class:`Entry`, read lazily."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import Cut, MonoCut

from nemo_mtbi.errors import ConfigError, DataError

PACKAGE = "pkg://"  # as in Hydra's search path
AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"}


@dataclass(frozen=True)
class Entry:
    """One utterance to prepare.

    Attributes:
        id: unique and stable over runs.
        load: makes the Lhotse cut (reads the audio header); may raise.
        speaker, text: for the split.
        split: fixed by the source, or None.
        silent: nothing is said, so the transcript is empty.
    """

    id: str
    load: Callable[[], Cut]
    speaker: str | None = None
    text: str = ""
    split: str | None = None
    silent: bool = False


@dataclass
class SourceConfig:
    """One entry of ``sources`` in ``conf/prepare.yaml``.

    Attributes:
        kind: cuts, shar, nemo, tsv, folder, lhotse_recipe, sentences or no_speech.
        path: manifest, Shar directory, table, folder, corpus directory or text file (sentences: ``everyday`` is built
            in); ``pkg://package/file`` is a file of an installed package.
        name: prefix of the utterance ids; for lhotse_recipe the recipe's name.
        audio_root: folder that relative audio paths start from (default: the table's own).
        audio_column, text_column, speaker_column: of a table.
        split_column: of a table whose rows name their split; null: ``split`` of prepare.yaml decides.
        language: of the transcripts.
        options: arguments of a Lhotse recipe, or settings of sentences and no_speech.
    """

    kind: str
    path: str | None = None
    name: str | None = None
    audio_root: str | None = None
    audio_column: str = "path"
    text_column: str = "transcript"
    speaker_column: str | None = "speaker"
    split_column: str | None = None
    language: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def utterance_cut(
    entry_id: str,
    audio: Path,
    text: str,
    speaker: str | None,
    language: str | None,
    custom: dict[str, Any] | None = None,
) -> MonoCut:
    """A cut over a whole audio file."""
    recording = Recording.from_file(audio, recording_id=entry_id)
    supervision = SupervisionSegment(
        id=entry_id,
        recording_id=entry_id,
        start=0.0,
        duration=recording.duration,
        text=text,
        speaker=speaker,
        language=language,
    )
    return (
        MonoCut(
            id=entry_id,
            start=0.0,
            duration=recording.duration,
            channel=recording.channel_ids[0],
            recording=recording,
            supervisions=[supervision],
            custom=custom,
        )
        if len(recording.channel_ids) == 1
        else _downmixed(recording, supervision, custom)
    )


def _downmixed(recording: Recording, supervision: SupervisionSegment, custom: dict[str, Any] | None) -> Any:
    cut = recording.to_cut()
    cut.id, cut.supervisions, cut.custom = supervision.id, [supervision], custom
    supervision.channel = recording.channel_ids
    return cut


def _in_package(path: str) -> Path:
    package, _, file = path.partition("/")
    try:
        return Path(str(files(package))) / file
    except ModuleNotFoundError as error:
        raise ConfigError(f"{PACKAGE}{path}: there is no installed package {package!r}.") from error


def _require(path: str | None, kind: str) -> Path:
    if not path:
        raise ConfigError(f"A source of kind {kind} needs path.")
    if path.startswith(PACKAGE):
        path = str(_in_package(path.removeprefix(PACKAGE)))
    if not Path(path).exists():
        raise DataError(f"Source {kind}: {path} does not exist.")
    return Path(path)


def _cut_entries(cuts: CutSet) -> Iterator[Entry]:
    for cut in cuts:
        supervision = cut.supervisions[0] if cut.supervisions else None
        text = " ".join(s.text or "" for s in cut.supervisions).strip()
        yield Entry(cut.id, lambda cut=cut: cut, supervision.speaker if supervision else None, text)  # type: ignore[misc]


def read_cuts(config: SourceConfig) -> Iterator[Entry]:
    """A Lhotse CutSet manifest."""
    path = _require(config.path, config.kind)
    if path.stat().st_size == 0:
        raise DataError(f"The manifest {path} is empty.")
    yield from _cut_entries(CutSet.from_file(path))


def read_shar(config: SourceConfig) -> Iterator[Entry]:
    """A Lhotse Shar directory."""
    yield from _cut_entries(CutSet.from_shar(in_dir=str(_require(config.path, config.kind))))


def read_nemo(config: SourceConfig) -> Iterator[Entry]:
    """A NeMo JSONL manifest: audio_filepath, text, optionally duration, offset, speaker."""
    path = _require(config.path, config.kind)
    with open(path, encoding="utf-8") as stream:
        lines = [line for line in stream if line.strip()]
    if not lines:
        raise DataError(f"The manifest {path} is empty.")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            audio, text = row["audio_filepath"], row["text"]
        except (json.JSONDecodeError, KeyError) as error:
            raise DataError(
                f"{path}, line {number}: {type(error).__name__} {error}. A NeMo manifest has one JSON object a "
                f"line with "
                "audio_filepath and text."
            ) from error
        audio_path = Path(audio) if Path(audio).is_absolute() else Path(config.audio_root or path.parent) / audio
        entry_id = f"{config.name or path.stem}-{number:07d}"

        def load(row: dict = row, audio_path: Path = audio_path, entry_id: str = entry_id, text: str = text) -> Cut:
            cut = utterance_cut(entry_id, audio_path, text, row.get("speaker"), row.get("lang", config.language))
            if row.get("offset") or "duration" in row:
                offset = float(row.get("offset") or 0.0)
                wanted = float(row.get("duration", cut.duration - offset))
                if offset + wanted > cut.duration + 0.1:
                    raise DataError(
                        f"offset + duration = {offset + wanted:.2f} s, but the audio lasts {cut.duration:.2f} s"
                    )
                if offset or wanted < cut.duration - 0.1:
                    cut = cut.truncate(offset=offset, duration=min(wanted, cut.duration - offset), preserve_id=True)
                    cut.supervisions[0].start, cut.supervisions[0].duration = 0.0, cut.duration
            return cut

        yield Entry(entry_id, load, row.get("speaker"), text)


def read_tsv(config: SourceConfig) -> Iterator[Entry]:
    """A tab-separated table with a header; columns are named in the configuration."""
    path = _require(config.path, config.kind)
    root = Path(config.audio_root or path.parent)
    with open(path, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        needed = {config.audio_column, config.text_column, *filter(None, [config.split_column])}
        missing = needed - set(reader.fieldnames or [])
        if missing:
            raise DataError(f"{path} has no column {', '.join(sorted(missing))}; it has {reader.fieldnames}.")
        for row in reader:
            audio, text = row[config.audio_column], (row[config.text_column] or "").strip()
            speaker = row.get(config.speaker_column) if config.speaker_column else None
            entry_id = f"{config.name or path.parent.name}-{Path(audio).with_suffix('').as_posix().replace('/', '-')}"
            yield Entry(
                entry_id,
                lambda a=audio, t=text, s=speaker, i=entry_id: utterance_cut(i, root / a, t, s, config.language),  # type: ignore[misc]
                speaker,
                text,
                row[config.split_column] if config.split_column else None,
            )


def read_folder(config: SourceConfig) -> Iterator[Entry]:
    """Audio files with a transcript beside each (``a.wav`` and ``a.txt``); the parent folder's name is the speaker."""
    root = _require(config.path, config.kind)
    recordings = sorted(f for f in root.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES)
    if not recordings:
        raise DataError(f"No audio file ({', '.join(sorted(AUDIO_SUFFIXES))}) under {root}.")
    for file in recordings:
        relative = file.relative_to(root).with_suffix("").as_posix().replace("/", "-")
        entry_id = f"{config.name or root.name}-{relative}"
        text_file = file.with_suffix(".txt")
        text = " ".join(text_file.read_text(encoding="utf-8").split()) if text_file.is_file() else ""
        speaker = file.parent.name if file.parent != root else None
        yield Entry(
            entry_id,
            lambda f=file, t=text, s=speaker, i=entry_id: utterance_cut(i, f, t, s, config.language),  # type: ignore[misc]
            speaker,
            text,
        )


def read_recipe(config: SourceConfig) -> Iterator[Entry]:
    """A corpus that Lhotse has a ``prepare_<name>`` recipe for."""
    import lhotse.recipes as recipes

    prepare = getattr(recipes, f"prepare_{config.name}", None)
    if prepare is None:
        known = sorted(n.removeprefix("prepare_") for n in dir(recipes) if n.startswith("prepare_"))
        raise ConfigError(f"Lhotse has no recipe {config.name!r}. Some it has: {', '.join(known[:40])}, ...")
    parts = prepare(_require(config.path, config.kind), **config.options)
    parts = {"": parts} if "recordings" in parts else parts
    for manifests in parts.values():
        yield from _cut_entries(CutSet.from_manifests(**manifests).trim_to_supervisions())


READERS: dict[str, Callable[[SourceConfig], Iterator[Entry]]] = {
    "cuts": read_cuts,
    "shar": read_shar,
    "nemo": read_nemo,
    "tsv": read_tsv,
    "folder": read_folder,
    "lhotse_recipe": read_recipe,
}
