"""Where utterances come from; every source is a stream of :class:`Entry`, read lazily, and again at every pass."""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import Cut, MonoCut
from lhotse.cut.data import DataCut
from lhotse.serialization import deserialize_item
from lhotse.shar.readers.lazy import LazySharIterator

from nemo_mtbi.corpus.failures import raise_if_of_the_machine
from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.audio import audio_files, part_of
from nemo_mtbi.data.audio_length import with_length
from nemo_mtbi.data.manifest import ManifestLine, cell, read_manifest
from nemo_mtbi.data.target import is_no_speech
from nemo_mtbi.errors import ConfigError, DataError, MTBIError
from nemo_mtbi.io.tables import read_table
from nemo_mtbi.io.text import read_text

PACKAGE = "pkg://"  # as in Hydra's search path
LEFT_OUT_OF_IDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")  # also the first to be taken of files of one name


@dataclass(frozen=True)
class Entry:
    """One utterance to prepare.

    Attributes:
        id: unique and stable over runs.
        load: makes the Lhotse cut (reads the audio header); may raise.
        speaker, text: for the split.
        split: fixed by the source, or None.
        where: file and line (or file) that names it, for messages.
        problem: why the source cannot give it, or None.
        silent: nothing is said, so the transcript is empty.
        about: audio, part, language and what else comes with it, as far as the source names them; see ``identity``.
        others: further speakers in it.
    """

    id: str
    load: Callable[[], Cut]
    speaker: str | None = None
    text: str = ""
    split: str | None = None
    where: str = ""
    problem: str | None = None
    silent: bool = False
    about: tuple[Any, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """What an utterance depends on beside its transcript: under the same id, another recording or speaker is
        prepared anew.
        """
        about = json.dumps([self.speaker, *map(str, self.about)])
        return hashlib.blake2b(about.encode(errors="replace"), digest_size=6).hexdigest()


@dataclass
class SourceConfig:
    """One entry of ``sources`` in ``conf/prepare.yaml``.

    Attributes:
        kind: cuts, shar, nemo, tsv (or csv), folder, lhotse_recipe, sentences or no_speech.
        path: manifest, Shar directory, table, folder, corpus directory or text file (sentences: ``everyday`` is built
            in); ``pkg://package/file`` is a file of an installed package.
        name: prefix of the utterance ids; for lhotse_recipe the recipe's name.
        audio_root: folder that relative audio paths start from (default: the table's own).
        audio_column, text_column: of a table.
        speaker_column: of a table, or a field of a NeMo manifest's lines.
        split_column: of a table whose rows name their split, or a field of a NeMo manifest's lines; null: ``split`` of
            prepare.yaml decides.
        language: of the transcripts (of cuts: of those that name none).
        encoding: of tables, NeMo manifests and transcripts; null: by their byte order mark, else UTF-8.
        speaker_prefix: put before its speakers, so that those of different corpora are different ones though they are
            called alike.
        metadata: further columns of a table, or fields of a NeMo manifest's lines, that are kept with the supervision
            (``gender``, others as custom fields), for descriptions.
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
    encoding: str | None = None
    speaker_prefix: str = ""
    metadata: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def utterance_cut(
    entry_id: str,
    audio: Path,
    text: str,
    speaker: str | None,
    language: str | None,
    custom: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> MonoCut:
    """A cut over a whole audio file; ``metadata``: gender and custom fields of its supervision."""
    own = {k: v for k, v in (metadata or {}).items() if v not in (None, "")}
    whole = with_length(audio)  # of a pipe: prepare keeps what says its length
    make = Recording.from_bytes if isinstance(whole, bytes) else Recording.from_file
    recording = make(whole, recording_id=entry_id)
    supervision = SupervisionSegment(
        id=entry_id,
        recording_id=entry_id,
        start=0.0,
        duration=recording.duration,
        text=text,
        speaker=speaker,
        language=language,
        gender=own.pop("gender", None),
        custom=own or None,
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
        return Path(str(package_files(package))) / file
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


def _cut_entries(
    cuts: Callable[[], Iterable[Cut]],
    name: str,
    language: str | None,
    load: Callable[[int, Cut], Callable[[], Cut]] | None = None,
) -> Iterator[Entry]:
    """Of Lhotse's cuts, which are opened here: what Lhotse says of another tool's file is said with its name.

    ``load``: of place and metadata of a cut, what reads the cut itself.
    """
    try:
        for position, cut in enumerate(cuts()):
            yield _cut_entry(in_order(cut, language), load and load(position, cut))
    except MTBIError:
        raise
    except Exception as error:  # of any kind, from Lhotse and what it reads with
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{name} cannot be read (any further) as Lhotse cuts ({said[:200]}).") from error


def _cut_entry(cut: Cut, load: Callable[[], Cut] | None = None) -> Entry:
    """``load``: where the cut itself is only its metadata."""
    text = transcript(cut)
    speakers = list(dict.fromkeys(str(s.speaker) for s in cut.supervisions if s.speaker not in (None, "")))
    about = (cut.duration, *(supervision.to_dict() for supervision in cut.supervisions))
    if isinstance(cut, DataCut) and cut.has_recording:
        about = (cut.start, *(s.source for s in cut.recording.sources if s.type in ("file", "url")), *about)
    first, others = (speakers[0], tuple(speakers[1:])) if speakers else (None, ())
    load, silent = load or partial(_itself, cut), is_no_speech(cut)
    return Entry(cut.id, load, first, text, where=f"cut {cut.id}", silent=silent, about=about, others=others)


def in_order(cut: Cut, language: str | None = None) -> Cut:
    """With its supervisions in order of time, texts that are text, and a ``language`` for those that have none."""
    for supervision in cut.supervisions:
        supervision.language = supervision.language or language
        if supervision.text is not None and not isinstance(supervision.text, str):
            supervision.text = str(supervision.text)
    if isinstance(cut, DataCut):
        cut.supervisions = sorted(cut.supervisions, key=lambda s: s.start)
    return cut


def packed(entry: Entry) -> Entry:
    """For waiting in memory, with many thousand others: with its cut compressed."""
    if not (isinstance(entry.load, partial) and entry.load.func is _itself):
        return entry
    cut = entry.load.args[0]
    stored = isinstance(cut, DataCut) and cut.has_recording
    if stored and all(source.type in ("file", "url", "command") for source in cut.recording.sources):
        try:
            return replace(entry, load=partial(unpacked, zlib.compress(json.dumps(cut.to_dict()).encode(), 1)))
        except TypeError:  # fields that are no JSON
            pass
    return entry


def unpacked(data: bytes) -> Cut:
    return deserialize_item(json.loads(zlib.decompress(data)))


def _itself(cut: Cut) -> Cut:
    return cut


def read_cuts(config: SourceConfig) -> Iterator[Entry]:
    """A Lhotse CutSet manifest."""
    path = _require(config.path, config.kind)
    if path.stat().st_size == 0:
        raise DataError(f"The manifest {path} is empty.")
    yield from _cut_entries(lambda: CutSet.from_file(path), str(path), config.language)


def read_shar(config: SourceConfig) -> Iterator[Entry]:
    """A Lhotse Shar directory."""
    path = str(_require(config.path, config.kind))
    try:
        shards = LazySharIterator(in_dir=path).shards
    except Exception as error:  # of any kind, from Lhotse
        raise DataError(f"{path} is no Lhotse Shar ({type(error).__name__}: {error}).") from error
    for number, shard in enumerate(shards):

        def load(position: int, cut: Cut, number: int = number) -> Callable[[], Cut]:
            return partial(SharReader.cut, path, number, position, cut.id, config.language)

        metadata = LazySharIterator({"cuts": [shard["cuts"]]})
        entries = _cut_entries(lambda metadata=metadata: metadata, str(shard["cuts"]), config.language, load)  # type: ignore[misc]
        yield from (replace(entry, about=(Path(path).resolve(), *entry.about)) for entry in entries)


class SharReader:
    """One shard of a Lhotse Shar, read from its beginning on; a process keeps the last one.

    Args:
        path: the Shar's folder.
        number: of the shard.
    """

    last: "SharReader | None" = None

    def __init__(self, path: str, number: int) -> None:
        self.place, self.position, self.problem = (path, number), 0, ""
        shard = LazySharIterator(in_dir=path).shards[number]
        self.cuts = iter(LazySharIterator({field: [file] for field, file in shard.items()}))

    @classmethod
    def cut(cls, path: str, number: int, position: int, name: str, language: str | None = None) -> Cut:
        """A cut with its data.

        Raises:
            DataError: the shard ends before it, or has another one there.
        """
        reader = cls.last
        if reader is None or reader.place != (path, number) or (reader.position > position and not reader.problem):
            reader = cls.last = cls(path, number)
        if not reader.problem:
            try:
                while reader.position < position:
                    next(reader.cuts)
                    reader.position += 1
                found = next(reader.cuts)
                reader.position += 1
            except StopIteration:
                reader.problem = "the shard's data end before it"
            except Exception as error:  # of any kind, from Lhotse: all cuts from here on are lost
                raise_if_of_the_machine(error)
                reader.problem = f"the shard cannot be read up to it ({type(error).__name__})"
        if reader.problem and position < reader.position:  # before the place that is broken
            cls.last = None
            return cls.cut(path, number, position, name, language)
        if reader.problem:
            raise DataError(reader.problem)
        if found.id != name:
            raise DataError(f"the shard now has {found.id} there")
        return in_order(found, language)


def read_nemo(config: SourceConfig) -> Iterator[Entry]:
    """A NeMo manifest; see :func:`nemo_mtbi.data.manifest.read_manifest`. Ids are of the audio and its part, so that
    they stay when lines are added."""
    path = _require(config.path, config.kind)
    name = config.name or Path(path.name.removesuffix(".gz")).stem
    ids: set[int] = set()
    for line in read_manifest(path, config.audio_root, config.encoding):
        entry_id, problem = f"{name}-line-{line.number}", line.problem
        if problem is None:
            said = [line.fields.get("audio_filepath"), line.offset_seconds, line.duration_seconds]
            beginning = f"{name}-{Path(str(line.audio)).stem}"
            part, whole = (f"{beginning}-{_digest(own)}" for own in (said, [*said, line.language, line.text]))
            if line.text is not None and hash(whole) in ids:
                problem = "another line is the same"
            elif line.text is not None:  # of one part, other texts (of another language, say) have ids of their own
                entry_id = whole if hash(part) in ids else part
                ids |= {hash(part), hash(whole)}

        column = config.speaker_column
        own_column = column is not None and column != SourceConfig.speaker_column
        try:
            speaker = (cell(line.fields, str(column)) if own_column else line.speaker) or None
            split = cell(line.fields, config.split_column) if config.split_column else None
        except DataError as error:
            speaker, split, problem = None, None, problem or str(error)

        def load(line: ManifestLine = line, entry_id: str = entry_id, speaker: str | None = speaker) -> Cut:
            assert line.audio is not None and line.text is not None
            language, metadata = line.language or config.language, {k: line.fields.get(k) for k in config.metadata}
            cut = utterance_cut(entry_id, line.audio, line.text, speaker, language, metadata=metadata)
            part = part_of(cut, line.offset_seconds, line.duration_seconds)
            if part is not cut:
                part.supervisions[0].start, part.supervisions[0].duration = 0.0, part.duration
            return part

        problem = problem or ("there is no text" if line.text is None else None)
        about = (line.audio, line.offset_seconds, line.duration_seconds, line.language or config.language)
        about += tuple(line.fields.get(k) for k in config.metadata)
        yield Entry(entry_id, load, speaker, line.text or "", split or None, line.where, problem, about=about)


def _digest(values: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(errors="replace"), digest_size=6).hexdigest()


def read_tsv(config: SourceConfig) -> Iterator[Entry]:
    """A table with a header; columns are named in the configuration. See :mod:`nemo_mtbi.io.tables`."""
    path = _require(config.path, config.kind)
    root = Path(config.audio_root or path.parent)
    needed = {config.audio_column, config.text_column, *filter(None, [config.split_column]), *config.metadata}
    if config.speaker_column not in (None, SourceConfig.speaker_column):  # the default one may be missing
        needed.add(config.speaker_column)
    quoted = True if config.kind == "csv" and ".tsv" not in path.suffixes else None
    for row in read_table(path, needed, config.encoding, quoted):
        audio, text = row.cells.get(config.audio_column, ""), row.cells.get(config.text_column, "")
        speaker = row.cells.get(config.speaker_column) or None if config.speaker_column else None
        relative = Path(audio)
        if relative.suffix.lower() in LEFT_OUT_OF_IDS:  # an id with dots is no suffix
            relative = relative.with_suffix("")
        problem, file = row.problem or (None if audio else f"{config.audio_column} is empty"), root / audio
        own = relative.as_posix().replace("/", "-") if problem is None else f"line-{row.line}"
        entry_id = f"{config.name or path.parent.name}-{own}"
        yield Entry(
            entry_id,
            partial(
                utterance_cut,
                entry_id,
                file,
                text,
                speaker,
                config.language,
                metadata={name: row.cells.get(name) for name in config.metadata},
            ),
            speaker,
            text,
            row.cells.get(config.split_column) or None if config.split_column else None,
            f"{path}, line {row.line}",
            problem,
            about=(file, config.language, *(row.cells.get(name) for name in config.metadata)),
        )


def read_folder(config: SourceConfig) -> Iterator[Entry]:
    """Audio files with a transcript beside each (``a.wav`` and ``a.txt``); the parent folder's name is the speaker."""
    root = _require(config.path, config.kind)
    files = audio_files(root)
    chosen: dict[Path, Path] = {}  # by name without its ending
    for file in files:
        chosen[file.with_suffix("")] = min(file, chosen.get(file.with_suffix(""), file), key=_preferred)
    for file in files:
        relative = file.relative_to(root).with_suffix("").as_posix().replace("/", "-")
        entry_id = f"{config.name or root.name}-{relative}"
        text_file = file.with_suffix(".txt")
        text, problem = "", None
        try:
            text = " ".join(read_text(text_file, config.encoding).split()) if text_file.is_file() else ""
        except DataError as error:  # one broken transcript must not stop the run; reasons are counted, so without place
            problem = "its transcript: " + re.sub(r"^(, line \d+:)? ", "", str(error).removeprefix(str(text_file)))
        if chosen[file.with_suffix("")] != file:
            entry_id, problem = f"{entry_id}{file.suffix}", "another audio file has the same name"
        speaker = file.parent.name if file.parent != root else None
        yield Entry(
            entry_id,
            lambda f=file, t=text, s=speaker, i=entry_id: utterance_cut(i, f, t, s, config.language),  # type: ignore[misc]
            speaker,
            text,
            where=str(file),
            problem=problem,
            about=(file, config.language),
        )


def _preferred(file: Path) -> tuple[int, str]:
    """Of an original and what it was converted to, the one that everything reads comes first."""
    suffix = file.suffix.lower()
    known = LEFT_OUT_OF_IDS.index(suffix) if suffix in LEFT_OUT_OF_IDS else len(LEFT_OUT_OF_IDS)
    return known, suffix


def read_recipe(config: SourceConfig) -> Iterator[Entry]:
    """A corpus that Lhotse has a ``prepare_<name>`` recipe for."""
    import lhotse.recipes as recipes

    prepare = getattr(recipes, f"prepare_{config.name}", None)
    if prepare is None:
        known = sorted(n.removeprefix("prepare_") for n in dir(recipes) if n.startswith("prepare_"))
        raise ConfigError(f"Lhotse has no recipe {config.name!r}. Some it has: {', '.join(known[:40])}, ...")
    path = _require(config.path, config.kind)

    def cuts() -> Iterator[Cut]:
        parts = prepare(path, **config.options)
        for manifests in ({"": parts} if "recordings" in parts else parts).values():
            yield from CutSet.from_manifests(**manifests).trim_to_supervisions(keep_overlapping=False)

    where = f"{path}, by Lhotse's recipe {config.name} with options {config.options},"
    yield from _cut_entries(cuts, where, config.language)


# Keys that mean something to a kind of source, beside kind and speaker_prefix. (Tables: all but options.)
TABLE_KEYS = {f.name for f in fields(SourceConfig)} - {"options"}
KEYS = {
    "cuts": {"path", "language"},
    "shar": {"path", "language"},
    "nemo": {"path", "name", "audio_root", "speaker_column", "split_column", "language", "encoding", "metadata"},
    "tsv": TABLE_KEYS,
    "csv": TABLE_KEYS,
    "folder": {"path", "name", "language", "encoding"},
    "lhotse_recipe": {"path", "name", "language", "options"},
    "sentences": {"path", "name", "language", "encoding", "options"},
    "no_speech": {"name", "language", "options"},
}


def require_keys(config: SourceConfig) -> None:
    """
    Raises:
        ConfigError: a key that a source of this kind does not look at.
    """
    given = {f.name for f in fields(config) if getattr(config, f.name) != getattr(SourceConfig(config.kind), f.name)}
    known = KEYS[config.kind] | {"kind", "speaker_prefix"}
    if foreign := sorted(given - known):
        raise ConfigError(
            f"A source of kind {config.kind} has no {foreign[0]} ({foreign[0]}: {getattr(config, foreign[0])!r}). It "
            f"has {', '.join(sorted(known))}."
        )


READERS: dict[str, Callable[[SourceConfig], Iterator[Entry]]] = {
    "cuts": read_cuts,
    "shar": read_shar,
    "nemo": read_nemo,
    "tsv": read_tsv,
    "csv": read_tsv,
    "folder": read_folder,
    "lhotse_recipe": read_recipe,
}
