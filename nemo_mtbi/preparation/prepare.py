"""Any paired speech and transcripts to Lhotse CutSets with word times, split by speaker.

Files under ``output_dir``: ``cuts.<split>.jsonl`` (for ``generate_targets.py``), ``prepared.jsonl`` (progress: one
line per finished utterance, so a killed run continues) and ``report.json`` (hours, words, skipped utterances with
reasons).
"""

import hashlib
import json
import logging
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from lhotse import Recording
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from lhotse.utils import fastcopy
from omegaconf import MISSING

from nemo_mtbi import console
from nemo_mtbi.corpus.execution import LOCAL, RAY, check_execution, spread
from nemo_mtbi.corpus.failures import alone, explained, raise_if_of_the_machine, sources_of
from nemo_mtbi.corpus.ray_data import RayConfig
from nemo_mtbi.data.alignments import from_its_beginning, transcript
from nemo_mtbi.data.audio import mono_samples
from nemo_mtbi.data.rendering import LONE_SURROGATE, TimedWord
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.text import language_code, word_count
from nemo_mtbi.preparation.describe import DescribeConfig, Describer, Tally
from nemo_mtbi.preparation.no_speech import LOWEST_NOISE_HZ, read_no_speech, write_flac
from nemo_mtbi.preparation.noisy import NoiseConfig, with_noise
from nemo_mtbi.preparation.sentences import read_sentences
from nemo_mtbi.preparation.sources import READERS, Entry, SourceConfig, packed, require_keys
from nemo_mtbi.preparation.voice_measures import VERSION
from nemo_mtbi.preparation.voice_report import write_voice_report
from nemo_mtbi.preparation.word_times import (
    ALIGNER_RATE,
    Aligner,
    TextGrids,
    Unalignable,
    build_aligner,
    check_aligner,
    give_words,
)

log = logging.getLogger(__name__)
MADE = {"sentences": read_sentences, "no_speech": read_no_speech}  # by this step
KINDS = (*READERS, *MADE)
DEFAULT_SHARES = {"train": 0.8, "held_out": 0.2}
CHUNKS = {LOCAL: 8, RAY: 64}  # utterances that a worker takes at once
AT_ONCE = {LOCAL: 1 << 16, RAY: 1 << 18}  # that are known at a time: about 2 kB each
DEADLY = "a worker process died of it, twice"
MAX_PLACES = 20  # of one reason, in the report
CHARACTERS_OF_A_WORD = 4  # of scripts without spaces: syllables that are said in the time of a word, and some
SPLIT_NAME = re.compile(r"[\w-][\w.-]*")
UNKNOWN_BYTES = 0x7FFF0000  # sizes from here on stand for "not known" in headers of streamed WAV


@dataclass
class SplitConfig:
    """How utterances are split.

    Attributes:
        by: ``speaker`` (a speaker is in one split only) or ``utterance``.
        shares: share of the speakers (or utterances) in each split; they sum to 1. Empty: DEFAULT_SHARES (the command
            line adds to mappings, so a default here could not be replaced).
        speakers: split of single speakers, by id; wins over the shares.
        seed: of the hash that decides.
    """

    by: str = "speaker"
    shares: dict[str, float] = field(default_factory=dict)
    speakers: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    def fixed(self, together: Mapping[str, str]) -> dict[str, str]:
        """``speakers``, by those by whom they are split.

        Raises:
            ConfigError: two who share recordings are to be in two splits.
        """
        found: dict[str, str] = {}
        for speaker, split in self.speakers.items():
            root = together.get(speaker, speaker)
            if found.setdefault(root, split) != split:
                raise ConfigError(
                    f"split.speakers puts {speaker} into {split}, and somebody who is in its recordings into "
                    f"{found[root]}: a recording is in one split."
                )
        return found

    def assign(self, entry: Entry, together: Mapping[str, str] | None = None) -> str:
        """Split of one utterance; see :meth:`assigning`."""
        return self.assigning(together)(entry)

    def assigning(self, together: Mapping[str, str] | None = None) -> Callable[[Entry], str]:
        """The split of each utterance; stable under adding data, but for speakers who come to share recordings.

        Args:
            together: of speakers who share recordings, the one by whom they are split (:class:`Sharing`).
        """
        roots = together or {}
        fixed_speakers = cache(lambda: self.fixed(roots))  # one pass over them, not one for each utterance
        shares = self.shares or DEFAULT_SHARES

        def split(entry: Entry) -> str:
            if entry.split is not None:
                return entry.split
            speaker = entry.speaker if entry.speaker is None else roots.get(entry.speaker, entry.speaker)
            if speaker in (fixed := fixed_speakers()):
                return fixed[speaker]
            key = speaker if self.by == "speaker" and speaker is not None else entry.id
            digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()
            point, total = int.from_bytes(digest, "big") / 2**64, 0.0
            for name, share in shares.items():
                total += share
                if point < total:
                    return name
            return list(shares)[-1]

        return split


class Sharing:
    """Speakers who share recordings, directly or through others -> the first of them, so that nobody is in two splits.

    Those who share none are left out.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.parent: dict[str, str] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        for other in entry.others:
            a, b = sorted((self._root(str(entry.speaker)), self._root(other)))
            self.parent[b] = a

    def roots(self) -> dict[str, str]:
        return {speaker: self._root(speaker) for speaker in list(self.parent)}

    def _root(self, speaker: str) -> str:
        parent = self.parent
        while parent.setdefault(speaker, speaker) != speaker:
            parent[speaker] = speaker = parent[parent[speaker]]
        return speaker


@dataclass
class PrepareConfig:
    """``conf/prepare.yaml``.

    Attributes:
        output_dir: where everything goes.
        sources: see :class:`SourceConfig`.
        aligner: ``pocketsphinx``, ``none``, a NeMo CTC model, or ``textgrids:FOLDER`` (Montreal Forced Aligner output).
        unaligned: ``keep`` utterances without word times (they are never interleaved) or ``skip`` them.
        min_seconds, max_seconds: durations that are kept.
        max_words_per_second: transcripts that are longer cannot belong to their audio.
        split: see :class:`SplitConfig`.
        executor, workers, ray: ``local``: so many processes of this machine; ``ray``: workers of a Ray cluster
            (:class:`nemo_mtbi.corpus.ray_data.RayConfig`). The result is the same.
        noise: see :class:`nemo_mtbi.preparation.noisy.NoiseConfig`.
        describe: see :class:`nemo_mtbi.preparation.describe.DescribeConfig`.
    """

    output_dir: str = MISSING
    sources: list[SourceConfig] = MISSING
    aligner: str = "pocketsphinx"
    unaligned: str = "keep"
    min_seconds: float = 0.2
    max_seconds: float = 600.0
    max_words_per_second: float = 8.0
    split: SplitConfig = field(default_factory=SplitConfig)
    executor: str = LOCAL
    workers: int = 1
    ray: RayConfig = field(default_factory=RayConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)


def recorder(config: PrepareConfig, worker: int) -> Callable[[Entry], dict[str, Any]]:
    """What a worker on another machine does."""
    return Preparation(config).record


class Skip(Exception):
    """The reason why an utterance is left out."""


def require_whole_files(cut: DataCut) -> None:
    """
    Raises:
        Skip: a cut that reaches the end of its recording is of a WAV file with less audio than its header announces
            (decoders give what there is, without a word).
    """
    if cut.end < cut.recording.duration - 1 / cut.sampling_rate:  # a part that is there
        return
    files = [Path(s.source) for s in sources_of(cut) if s.type == "file" and str(s.source).lower().endswith(".wav")]
    if any(file.is_file() and is_cut_off(file) for file in files):
        raise Skip("the WAV file is shorter than its header says")


def is_cut_off(wav: Path) -> bool:
    """Whether a file ends before its RIFF chunk ``data`` does. (What was written to a pipe does not know its size.)"""
    with open(wav, "rb") as file:
        if file.read(4) != b"RIFF" or len(file.read(8)) < 8:
            return False
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return 0 < size < UNKNOWN_BYTES and wav.stat().st_size - file.tell() < size
            file.seek(size + size % 2, os.SEEK_CUR)
    return False


def prefixed(entry: Entry, prefix: str) -> Entry:
    """With other names of its speakers."""

    def load() -> Cut:
        cut = entry.load()
        if isinstance(cut, DataCut):
            named = [s.speaker and f"{prefix}{s.speaker}" for s in cut.supervisions]
            own = [fastcopy(s, speaker=speaker) for s, speaker in zip(cut.supervisions, named, strict=True)]
            cut = fastcopy(cut, supervisions=own)
        return cut

    own = None if entry.speaker is None else f"{prefix}{entry.speaker}"
    return replace(entry, load=load, speaker=own, others=tuple(f"{prefix}{other}" for other in entry.others))


class Preparation:
    """Runs the step for a :class:`PrepareConfig`."""

    def __init__(self, config: PrepareConfig) -> None:
        if not config.sources:
            raise ConfigError("prepare: sources is empty; name at least one (cuts, shar, nemo, tsv, folder, ...).")
        for source in config.sources:
            if source.kind not in KINDS:
                raise ConfigError(f"Unknown source kind {source.kind!r}. Known kinds: {', '.join(KINDS)}.")
            require_keys(source)
        if config.unaligned not in ("keep", "skip"):
            raise ConfigError(f"unaligned={config.unaligned!r}: use keep or skip.")
        shares = (config.split.shares or DEFAULT_SHARES).values()
        whole = all(0 <= share <= 1 for share in shares) and abs(sum(shares) - 1) <= 1e-6
        if not whole or config.split.by not in ("speaker", "utterance"):
            raise ConfigError(
                f"split: shares {config.split.shares} must be from 0 to 1 and sum to 1, and by must be speaker or "
                "utterance."
            )
        for name in (*(config.split.shares or DEFAULT_SHARES), *config.split.speakers.values()):
            if not SPLIT_NAME.fullmatch(name):
                raise ConfigError(f"split: {name!r} names files; letters, digits, '_', '-' and '.' only.")
        if not 0 <= config.min_seconds < config.max_seconds or config.max_words_per_second <= 0:
            raise ConfigError(
                f"min_seconds={config.min_seconds}, max_seconds={config.max_seconds}, "
                f"max_words_per_second={config.max_words_per_second}: no utterance could be kept."
            )
        config.noise.check()
        check_execution(config.executor, config.workers)
        self.config = config
        self.describer = Describer(config.describe) if config.describe.enabled else None
        self.folder = Path(config.output_dir)
        self._aligner: Aligner | None = None
        self._listed: dict[int, list[Entry]] = {}  # of some sources by number
        self.textgrids: TextGrids | None = None
        if config.aligner.startswith("textgrids:"):
            self.textgrids = TextGrids(Path(config.aligner.removeprefix("textgrids:")))
        else:
            check_aligner(config.aligner)

    @property
    def aligner(self) -> Aligner | None:
        if self._aligner is None and self.textgrids is None:
            self._aligner = build_aligner(self.config.aligner)
        return self._aligner

    def run(self) -> dict[str, Path]:
        """Prepare what is missing; returns the written manifests by split.

        Raises:
            DataError: a source is missing or empty, or no utterance is left.
        """
        settings = self.settings

        def kept(record: dict[str, Any]) -> tuple[bool, bool, Any, str | None] | None:
            """Of a record of these settings: whether it is skipped, and tried again; of which text, of what else."""
            if record.get("settings") != settings:
                return None
            why = record.get("skipped")
            grid_missing = self.textgrids is not None and record.get("unaligned") is not None  # it may be there now
            again = why not in (None, DEADLY) or grid_missing
            return why is not None, again, hash(record.get("text")), record.get("of")

        def finished(entry: Entry) -> bool:
            """A changed transcript or recording is prepared again, and a skipped utterance is tried again, unless it
            kills who tries."""
            if entry.problem is not None:
                return False
            _, known = journal.places.get(entry.id, (0, None))
            same = known is not None and known[1:3] == (False, hash(entry.text))
            return same and known[3] in (None, entry.identity)  # older records do not say of what they are

        self._require_other_sources()
        journal_file = self.folder / "prepared.jsonl"
        with explained(self.folder), alone(self.folder, "prepare"), jsonl.Journal(journal_file, kept) as journal:
            todo, sharing = self._first_pass(finished)
            records = self._records(e for e in self._entries() if not finished(e)) if todo else iter(())
            for record in console.progress(records, total=todo, desc="prepare", unit="utt", disable=not todo):
                journal.write(record)
            return self._write(journal, sharing)

    def _require_other_sources(self) -> None:
        """
        Raises:
            ConfigError: a source is a manifest that this step writes, or removes where its split is empty.
        """
        for source in self.config.sources:
            path = Path(source.path or "").resolve()
            if path.parent == self.folder.resolve() and re.fullmatch(r"cuts\..+\.jsonl", path.name):
                raise ConfigError(
                    f"The source {source.path} has a name that is this step's to write: choose another output_dir."
                )

    def _first_pass(self, finished: Callable[[Entry], bool]) -> tuple[int, Sharing]:
        """How many utterances are still to be prepared, and who shares recordings.

        Raises:
            DataError: an id occurs twice.
        """
        known, twice, todo, sharing = set[bytes](), list[str](), 0, Sharing()
        for entry in self._entries():
            digest = hashlib.blake2b(entry.id.encode(errors="replace"), digest_size=8).digest()
            twice += [entry.id] if digest in known else []
            known.add(digest)
            todo += not finished(entry)
            sharing.add(entry)
        if twice:
            places = [e.where for e in self._entries() if e.id == twice[0] and e.where]
            raise DataError(
                f"Utterance id {twice[0]} occurs twice ({len(twice)} such; {' and '.join(places[:2])}). "
                "Give the sources names, or name every recording once."
            )
        return todo, sharing

    def _records(self, todo: Iterator[Entry]) -> Iterator[dict[str, Any]]:
        """Of a stream of entries, of which some thousands are in memory."""
        c = self.config
        if self.textgrids is not None and c.executor == LOCAL:
            self.textgrids.look()  # before processes are forked
        make = partial(recorder, c) if c.executor == RAY else lambda worker: self.record
        while some := list(map(packed, islice(todo, AT_ONCE[c.executor]))):
            yield from spread(
                make, some, c.executor, c.workers, c.ray, chunk=CHUNKS[c.executor], died=self._skipped_as_deadly
            )

    def _skipped_as_deadly(self, entry: Entry) -> dict[str, Any]:
        return self._beginning(entry) | {"skipped": DEADLY}

    def _beginning(self, entry: Entry) -> dict[str, Any]:
        return {"id": entry.id, "settings": self.settings, "text": entry.text, "of": entry.identity}

    def record(self, entry: Entry) -> dict[str, Any]:
        """The journal's line about an utterance: its cut, or why it is skipped."""
        record = self._beginning(entry)
        if (half := LONE_SURROGATE.search(entry.text)) is not None:
            text = entry.text.encode(errors="backslashreplace").decode()
            return record | {"text": text, "skipped": f"its text holds half a character ({half.group()!r})"}
        try:
            noticed: list[str] = []
            cut, unaligned, clean = self._prepare(entry, noticed)
            samples = clean
            if not entry.silent:
                cut, samples = with_noise(cut, clean, ALIGNER_RATE, self.config.noise, self.folder / "noisy")
            if self.describer is not None:
                self.describer.measure(cut, samples, ALIGNER_RATE, clean)
        except Skip as skip:
            return record | {"skipped": str(skip)}
        try:
            found = record | {"cut": cut.to_dict(), "unaligned": unaligned, "audio": noticed}
            jsonl.dumps(found).encode()
        except (TypeError, UnicodeEncodeError) as error:
            return record | {"skipped": f"cannot be written: {_cause(error)}"}
        return found

    @cached_property
    def settings(self) -> str:
        """What a finished utterance depends on beside its entry."""
        c = self.config
        metadata = [[s.name or s.path, s.metadata] for s in c.sources if s.metadata]
        further: list[Any] = [f"measured {VERSION}", metadata] if self.describer else [metadata] if metadata else []
        further += [asdict(c.noise), LOWEST_NOISE_HZ] if c.noise.share else []
        return json.dumps([c.aligner, c.unaligned, c.min_seconds, c.max_seconds, c.max_words_per_second, *further])

    def _entries(self) -> Iterator[Entry]:
        """All utterances, read anew: a corpus is gone through several times, and is never in memory. (But for what a
        Lhotse recipe makes of one, which takes minutes.)"""
        for number, source in enumerate(self.config.sources):
            made = MADE.get(source.kind)
            if number in self._listed:
                entries: Iterable[Entry] = self._listed[number]
            elif source.kind == "lhotse_recipe":
                entries = self._listed[number] = list(READERS[source.kind](source))
            else:
                entries = READERS[source.kind](source) if made is None else made(source, self.folder)
            for entry in entries:
                if source.speaker_prefix:
                    entry = prefixed(entry, source.speaker_prefix)
                if LONE_SURROGATE.search(entry.id + entry.where):  # of a file whose name is no UTF-8
                    name, where = (text.encode(errors="backslashreplace").decode() for text in (entry.id, entry.where))
                    entry = replace(entry, id=name, where=where, problem="its name is no UTF-8")
                if entry.split is not None and not SPLIT_NAME.fullmatch(entry.split):  # it names a file
                    problem = f"split {entry.split!r}: letters, digits, '_', '-' and '.' only"
                    entry = replace(entry, split=None, problem=entry.problem or problem)
                yield entry

    def _prepare(self, entry: Entry, noticed: list[str]) -> tuple[Cut, str | None, np.ndarray]:
        """The cut with word times, why it has none, and its samples; ``noticed`` takes what is wrong with the audio."""
        if entry.problem is not None:
            raise Skip(entry.problem)
        if not entry.text.strip() and not entry.silent:
            raise Skip("empty transcript")
        try:
            cut = entry.load()
        except Exception as error:  # one broken recording among a million must not stop the run
            raise_if_of_the_machine(error)
            raise Skip(f"unreadable audio: {_cause(error)}") from None
        c = self.config
        if cut.duration <= 0:
            raise Skip("unreadable audio: no samples")
        if not c.min_seconds <= cut.duration <= c.max_seconds:
            raise Skip(f"duration outside [{c.min_seconds}, {c.max_seconds}] s")
        if word_count(entry.text, CHARACTERS_OF_A_WORD) / cut.duration > c.max_words_per_second:
            raise Skip(f"more than {c.max_words_per_second} words a second: transcript and audio cannot match")
        if not isinstance(cut, DataCut):
            raise Skip("a mixed cut: save it as a recording first (CutSet.save_audios)")
        try:
            cut = self._on_disk(cut)
            require_whole_files(cut)
            samples = self._samples(cut, noticed)
        except Skip:
            raise
        except Exception as error:
            raise_if_of_the_machine(error, sources_of(cut))
            raise Skip(f"unreadable audio: {_cause(error)}") from None
        if entry.silent or all((s.alignment or {}).get("word") for s in cut.supervisions if (s.text or "").strip()):
            return cut, None, samples
        try:
            words = self._align(cut, entry, samples)
        except Unalignable as reason:
            if c.unaligned == "skip":
                raise Skip(f"unalignable: {reason}") from None
            return cut, str(reason), samples
        give_words(cut, words)
        return cut, None, samples

    def _on_disk(self, cut: Cut) -> Cut:
        """Audio that a Shar brought in memory becomes a FLAC file, since manifests refer to files."""
        if any(source.type in ("memory", "shar") for source in cut.recording.sources):
            name = re.sub(r"[^\w.-]+", "-", cut.id, flags=re.ASCII)[:80]
            digest = hashlib.blake2b(cut.id.encode(), digest_size=8).hexdigest()
            path = self.folder / "audio" / f"{name}-{digest}.flac"
            own = from_its_beginning(cut)
            write_flac(path, own.load_audio().T, own.sampling_rate)
            whole = Recording.from_file(path).to_cut()
            cut = fastcopy(whole, id=own.id, supervisions=own.supervisions, custom=own.custom)
            # Shar notes where a cut came from as a Path, which is no JSON; its other fields have their data in memory.
            custom = {k: str(v) if isinstance(v, Path) else v for k, v in (cut.custom or {}).items()}
            cut.custom = {k: v for k, v in custom.items() if not hasattr(v, "to_dict")}
        return cut

    def _samples(self, cut: Cut, noticed: list[str]) -> np.ndarray:
        samples = mono_samples(cut, ALIGNER_RATE, noticed)
        if not len(samples):
            raise ValueError("no samples")
        if cut.supervisions and transcript(cut) and not samples.any():
            raise Skip("all samples are zero, and there is a transcript")
        return samples

    def _align(self, cut: Cut, entry: Entry, samples: np.ndarray) -> Sequence[TimedWord]:
        if self.textgrids is not None:
            return self.textgrids.words(cut)
        if self.aligner is None:
            raise Unalignable("no aligner is configured")
        spoken = {language_code(s.language) for s in cut.supervisions if s.language}
        if self.aligner.language is not None and spoken - {self.aligner.language}:
            raise Unalignable(f"{self.config.aligner} knows {self.aligner.language} alone, no {min(spoken)}")
        return self.aligner.align(samples, entry.text)

    def _write(self, journal: jsonl.Journal, sharing: Sharing) -> dict[str, Path]:
        """Manifests and report, from one record at a time."""

        def entries() -> Iterator[Entry]:
            """That have a record; what has come to the sources meanwhile is the next run's."""
            return (e for e in self._entries() if e.id in journal)

        count, tally = Counts(), Tally()
        contradicting: dict[str, dict[str, str]] = {}
        if self.describer is not None:
            kept = (e.id for e in entries() if not journal.places[e.id][1][0])
            contradicting = self.describer.contradictions(journal[name]["cut"] for name in kept)
        written: dict[str, Path] = {}
        split_of = self.config.split.assigning(sharing.roots() if self.config.split.by == "speaker" else {})
        with ExitStack() as files:
            streams: dict[str, TextIO] = {}
            for entry in entries():
                record = journal[entry.id]
                if not count.visit(entry, record):
                    continue
                cut, split = record["cut"], split_of(entry)
                if self.describer is not None:
                    self.describer.rewrite(cut, contradicting, tally)
                count.keep(split, cut)
                if split not in streams:
                    written[split] = self.folder / f"cuts.{split}.jsonl"
                    streams[split] = files.enter_context(jsonl.replacing(written[split], uuid.uuid4().hex))
                streams[split].write(jsonl.dumps(cut) + "\n")
        report, before = count.report(), self._splits_before()
        if self.describer is not None:
            report["described"] = self.describer.report(tally)
        for name in before - written.keys() if written else ():  # before the report, which says what is ours to remove
            (self.folder / f"cuts.{name}.jsonl").unlink(missing_ok=True)
        jsonl.write_json(self.folder / "report.json", report)
        if self.describer is not None:
            cuts = (cut for path in written.values() for cut in jsonl.read(path))
            write_voice_report(self.folder / "voices.html", report, cuts)
        count.tell(self.folder / "report.json")
        shares = self.config.split.shares or DEFAULT_SHARES
        empty = [name for name, share in shares.items() if share > 0 and name not in written]
        if empty and self.config.split.by == "speaker":
            log.warning(
                f"Nothing is in {' or '.join(empty)}: all of a speaker goes into one split, and there are few. "
                "With split.by=utterance speakers are in all of them."
            )
        return written

    def _splits_before(self) -> set[str]:
        """Splits that the run before has written; other manifests in the folder are the user's."""
        try:
            names = json.loads((self.folder / "report.json").read_text())["splits"]
            return {name for name in names if SPLIT_NAME.fullmatch(name)}
        except (OSError, ValueError, KeyError, TypeError):
            return set()


class Counts:
    """What a run has kept, and what it has left out and why."""

    def __init__(self) -> None:
        self.splits: dict[str, dict[str, Any]] = {}
        self.skipped, self.unaligned, self.noticed = Counter[str](), Counter[str](), Counter[str]()
        self.places: dict[str, list[str]] = {}

    def visit(self, entry: Entry, record: dict[str, Any]) -> bool:
        """Whether an utterance is kept."""
        if reason := record.get("skipped"):
            self.skipped[reason] += 1
            places = self.places.setdefault(reason, [])
            if len(places) < MAX_PLACES:
                places.append(entry.where or entry.id)
            return False
        self.noticed.update(record.get("audio", ()))
        if record.get("unaligned"):
            self.unaligned[record["unaligned"]] += 1
        return True

    def keep(self, split: str, cut: dict[str, Any]) -> None:
        own = self.splits.setdefault(split, {"utterances": 0, "hours": 0.0, "words": 0, "speakers": set()})
        own["utterances"] += 1
        own["hours"] += cut["duration"] / 3600
        own["words"] += sum(len(s.get("text", "").split()) for s in cut["supervisions"])
        own["speakers"] |= {str(s["speaker"]) for s in cut["supervisions"] if s.get("speaker")}

    def report(self) -> dict[str, Any]:
        return {
            "splits": {name: {**own, "speakers": sorted(own["speakers"])} for name, own in self.splits.items()},
            "skipped": sum(self.skipped.values()),
            "skipped_reasons": dict(self.skipped.most_common()),
            "skipped_where": {reason: self.places[reason] for reason, _ in self.skipped.most_common()},
            "audio_repaired": dict(self.noticed.most_common()),
            "without_word_times": sum(self.unaligned.values()),
            "without_word_times_reasons": dict(self.unaligned.most_common(50)),
        }

    def tell(self, report: Path) -> None:
        """
        Raises:
            DataError: nothing is left.
        """
        if not self.splits:
            raise DataError(
                f"No utterance is left: all {sum(self.skipped.values())} were skipped, most often "
                f"{_first_place(self.skipped, self.places)}. See {report}."
                if self.skipped
                else "The sources hold no utterance."
            )
        if self.skipped:
            left_out, kept = sum(self.skipped.values()), sum(own["utterances"] for own in self.splits.values())
            log.warning(
                f"{left_out} of {left_out + kept} utterances are left out, most often "
                f"{_first_place(self.skipped, self.places)}. All reasons: {report}."
            )


def _first_place(skipped: Counter[str], places: dict[str, list[str]]) -> str:
    reason = skipped.most_common(1)[0][0]
    return f"for {reason!r} (first: {places[reason][0]})"


def _cause(error: BaseException) -> str:
    """What went wrong, without the file that it went wrong with, so that equal reasons are counted together."""
    text = str(error)
    if found := re.search(r"LibsndfileError'>: (?:Error opening .*: )?(.+?)\.?$", text, re.MULTILINE):
        return found[1]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    line = (str(error).strip().splitlines() or [""])[0]
    line = re.sub(r"'[^']*[/\\][^']*'|\S*[/\\]\S+", "FILE", line)
    return f"{type(error).__name__}: {line}"[:200]
