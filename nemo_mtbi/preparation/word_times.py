"""Word times by forced alignment.

An aligner gives one :class:`TimedWord` per word of the transcript, or says why not.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from lhotse.cut import Cut
from lhotse.supervision import SupervisionSegment

from nemo_mtbi.data.alignments import BEYOND_SECONDS, WORDS, set_words
from nemo_mtbi.data.audio import resample
from nemo_mtbi.data.rendering import TimedWord
from nemo_mtbi.errors import ConfigError, DataError

ALIGNER_RATE = 16_000
OF_SPEAKER = " - words"  # how the Montreal Forced Aligner names tiers
SPECIAL = re.compile(r"<.*>|\[.*\]")  # pieces of a vocabulary that are no text


class Unalignable(Exception):
    """The reason why an utterance has no word times."""


class Aligner(Protocol):
    """``align`` takes float32 mono samples at 16 kHz and the transcript.

    ``language``: the only one that it knows (ISO 639-1); None: it is not said.

    Raises:
        Unalignable: with the reason.
    """

    @property
    def language(self) -> str | None: ...

    def align(self, samples: np.ndarray, transcript: str) -> list[TimedWord]: ...


class PocketSphinxAligner:
    """CMU PocketSphinx (BSD): offline, English, 0.01 x real time. Words outside its dictionary get no times.

    Unknown words are left out of the aligned text; their neighbours keep their times.
    """

    language = "en"

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise ConfigError("aligner=pocketsphinx needs `pip install nemo-mtbi[align]`.") from None
        self.decoder: Any = Decoder(lm=None, samprate=ALIGNER_RATE, loglevel="FATAL", bestpath=False)

    def align(self, samples: np.ndarray, transcript: str) -> list[TimedWord]:
        words = transcript.split()
        keys = [re.sub(r"[^a-z']", "", w.lower()).strip("'") for w in words]
        known = [(i, k) for i, k in enumerate(keys) if k and self.decoder.lookup_word(k)]
        require_half(len(known), len(words), "are in PocketSphinx's dictionary")
        pcm = (np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes()
        try:
            self.decoder.reinit_feat()  # else times depend on what was aligned before
            self.decoder.set_align_text(" ".join(k for _, k in known))
            self.decoder.start_utt()
            self.decoder.process_raw(pcm, full_utt=True)
            self.decoder.end_utt()
        except RuntimeError as error:
            raise Unalignable(f"PocketSphinx: {error}") from None
        segments = [s for s in self.decoder.seg() or [] if not s.word.startswith(("<", "[", "+"))]
        if len(segments) != len(known):
            raise Unalignable("the transcript does not fit the audio")
        times = [TimedWord(w) for w in words]
        rate = 100  # PocketSphinx frames per second
        for (index, _), segment in zip(known, segments, strict=True):
            times[index] = TimedWord(words[index], segment.start_frame / rate, (segment.end_frame + 1) / rate)
        return times


class NeMoCTCAligner:
    """NeMo's forced-alignment utilities (as its ``ForceAligner`` uses them) with a CTC or hybrid model.

    What its vocabulary cannot write (capitals, punctuation, digits, another script) is left out, since NeMo would align
    it as silence; words without anything left get no times.

    Args:
        model: NeMo ASR model, name or .nemo.
    """

    language = None

    def __init__(self, model: str) -> None:
        from nemo.collections.asr.models import ASRModel

        load = ASRModel.restore_from if model.endswith(".nemo") else ASRModel.from_pretrained
        try:
            self.model = load(model).eval()
        except Exception as error:  # of NeMo, of a hub, of an archive
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"aligner={model!r} cannot be loaded: {reason[:200]}.") from error
        self.seconds = self.model.cfg.preprocessor.window_stride * self.model.encoder.subsampling_factor
        self.rate = self.model.cfg.preprocessor.get("sample_rate", ALIGNER_RATE)
        decoder = getattr(self.model, "ctc_decoder", None) or self.model.decoder
        self.letters = {letter for piece in decoder.vocabulary if not SPECIAL.fullmatch(piece) for letter in piece}

    def spelled(self, word: str) -> str:
        """A word with the letters that the model can write."""
        forms = (word, word.lower(), word.upper())
        return max(("".join(c for c in form if c in self.letters) for form in forms), key=len)

    def align(self, samples: np.ndarray, transcript: str) -> list[TimedWord]:
        from nemo.collections.asr.parts.utils import aligner_utils as nemo

        words = transcript.split()
        known = [(index, own) for index, word in enumerate(words) if (own := self.spelled(word))]
        require_half(len(known), len(words), "can be written with the aligner's vocabulary")
        variables = nemo.get_batch_variables(
            audio=[resample(samples, ALIGNER_RATE, self.rate)],
            model=self.model,
            gt_text_batch=[" ".join(own for _, own in known)],
            output_timestep_duration=self.seconds,
            verbose=False,
        )
        log_probs, tokens, frames, token_counts, utterances, seconds = variables
        if int(token_counts[0]) <= 1:  # NeMo leaves one blank of a transcript that does not fit
            raise Unalignable("NeMo found more tokens in the transcript than frames in the audio")
        path = nemo.viterbi_decoding(log_probs, tokens, frames, token_counts, self.model.device)[0]
        utterance = nemo.add_t_start_end_to_utt_obj(utterances[0], path, seconds)
        parts = [w for s in utterance.segments_and_tokens if isinstance(s, nemo.Segment) for w in s.words_and_tokens]
        aligned = [part for part in parts if isinstance(part, nemo.Word)]
        if len(aligned) != len(known):
            raise Unalignable("the transcript does not fit the audio")
        times = [TimedWord(word) for word in words]
        for (index, _), own in zip(known, aligned, strict=True):
            times[index] = TimedWord(words[index], own.t_start, own.t_end)
        return times


def require_half(known: int, words: int, what: str) -> None:
    """
    Raises:
        Unalignable: fewer than half of the words are known.
    """
    if not known:
        raise Unalignable(f"no word of the transcript {what.replace('are', 'is', 1)}")
    if known < 0.5 * words:
        raise Unalignable(f"only {known} of {words} words {what}")


def build_aligner(name: str | None) -> Aligner | None:
    """``pocketsphinx``, a NeMo CTC model name or .nemo path, or None for no alignment."""
    if name in (None, "none"):
        return None
    if name == "pocketsphinx":
        return PocketSphinxAligner()
    assert name is not None
    return NeMoCTCAligner(name)


def check_aligner(name: str | None) -> None:
    """
    Raises:
        ConfigError: no aligner has such a name.
    """
    if name in (None, "none", "pocketsphinx"):
        return
    assert name is not None
    if name.endswith(".nemo") and not Path(name).is_file():
        raise ConfigError(f"aligner={name!r}: there is no such file.")
    if difflib.get_close_matches(name, ["pocketsphinx", "none", "textgrids"], 1, 0.75):
        raise ConfigError(
            f"aligner={name!r}: use pocketsphinx, none, textgrids:FOLDER, or a NeMo CTC model (a name such as "
            "nvidia/stt_de_conformer_ctc_large, or a .nemo file)."
        )


@dataclass(frozen=True)
class SpeakersWord(TimedWord):
    """A word of a TextGrid: of the tier of ``speaker``, or of one for all."""

    speaker: str | None = None


def give_words(cut: Cut, words: Sequence[TimedWord]) -> None:
    """The words of a cut's transcript to its supervisions; those that have words keep theirs.

    In their order, or, where each word has a speaker, to the utterance of that speaker in whose time it lies.
    """
    speakers = [word.speaker for word in words if isinstance(word, SpeakersWord) and word.speaker is not None]
    if len(speakers) == len(words) and set(speakers) <= {s.speaker for s in cut.supervisions}:
        own: list[list[TimedWord]] = [[] for _ in cut.supervisions]
        for word, speaker in zip(words, speakers, strict=True):
            own[_nearest(cut, word, speaker)].append(word)
        for supervision, found in zip(cut.supervisions, own, strict=True):
            _set_words(cut, supervision, found)
        return
    counts = [len((supervision.text or "").split()) for supervision in cut.supervisions]
    if len(counts) == 1 or sum(counts) != len(words):  # a TextGrid may have other words than the transcript
        ends = [supervision.end for supervision in cut.supervisions[:-1]]
        owners = [sum((w.end_seconds or 0.0) > end for end in ends) for w in words]
        counts = [owners.count(index) for index in range(len(counts))]
    place = 0
    for supervision, count in zip(cut.supervisions, counts, strict=True):
        _set_words(cut, supervision, words[place : place + count])
        place += count


def _set_words(cut: Cut, supervision: SupervisionSegment, words: Sequence[TimedWord]) -> None:
    if not (supervision.alignment or {}).get(WORDS):
        set_words(supervision, words, cut.start)


def _nearest(cut: Cut, word: TimedWord, speaker: str) -> int:
    """The speaker's utterance that is nearest to a word."""
    assert word.start_seconds is not None and word.end_seconds is not None
    middle = (word.start_seconds + word.end_seconds) / 2
    far = {i: max(s.start - middle, middle - s.end) for i, s in enumerate(cut.supervisions) if s.speaker == speaker}
    return min(far, key=far.__getitem__)


class Mark(NamedTuple):
    """A word of a TextGrid, and whose tier it stands in (``NAME - words``)."""

    text: str
    begin: float
    end: float
    speaker: str | None


def words_of_grid(file: Path) -> list[Mark]:
    """Words of the tier ``words``, or of several speakers' (``NAME - words``), with their times, in order of time.

    Raises:
        Unalignable: it is no TextGrid.
        ConfigError: the package textgrid is not installed.
    """
    try:
        from textgrid import TextGrid
    except ImportError as error:
        raise ConfigError("TextGrids are read by the package textgrid: pip install 'nemo-mtbi[align]'.") from error
    grid = TextGrid()
    try:
        grid.read(str(file))
        tiers = [tier for tier in grid if tier.name == "words" or tier.name.endswith(OF_SPEAKER)]
        marked = [
            Mark(str(i.mark).strip(), float(i.minTime), float(i.maxTime), tier.name[: -len(OF_SPEAKER)].strip() or None)
            for tier in tiers
            for i in tier
        ]
    except Exception as error:  # of any kind, about a file of another tool
        raise Unalignable(f"no TextGrid ({type(error).__name__}: {str(error)[:100]})") from None
    return sorted((w for w in marked if w.text and not w.text.startswith("<")), key=lambda w: w.begin)


class TextGrids:
    """Word times from files as the Montreal Forced Aligner writes them: ``<cut id>.TextGrid`` or
    ``<audio stem>.TextGrid``, anywhere in a folder, which is looked through once. Of several of one name the one whose
    folders are called like the audio's is taken.

    Raises:
        DataError: it is no folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"aligner: {folder} is not a folder of TextGrid files.")
        self.folder = folder

    def look(self) -> None:
        """Through the folder, now."""
        _ = self.files

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """By path in the folder, and by name, both without the ending."""
        found: dict[str, list[Path]] = {}
        for file in sorted(self.folder.rglob("*.TextGrid")):
            for name in {file.stem, file.relative_to(self.folder).with_suffix("").as_posix()}:
                found.setdefault(name, []).append(file)
        return found

    def _file(self, name: str, audio: Path) -> Path | None:
        """
        Raises:
            Unalignable: several files fit equally well.
        """
        found = self.files.get(name, [])
        if len(found) <= 1:
            return found[0] if found else None

        def shared(file: Path) -> int:
            """Folders, from the innermost on, that are called like the audio's."""
            pairs = zip(file.parts[-2::-1], audio.parts[-2::-1], strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

        best = max(map(shared, found))
        fitting = [file for file in found if shared(file) == best]
        if len(fitting) > 1:
            raise Unalignable("several TextGrids of the audio's name, in folders that are not the audio's")
        return fitting[0]

    def words(self, cut: Cut) -> list[SpeakersWord]:
        """
        Raises:
            Unalignable: there is no file, or not one alone, or it has no words, or ones beyond the audio.
        """
        audio = Path(str(cut.recording.sources[0].source))
        of_cut = self._file(cut.id, audio)
        file = of_cut or self._file(audio.stem, audio)
        if file is None:
            raise Unalignable("no TextGrid of the cut's or the audio's name")
        words = words_of_grid(file)
        if not words:
            raise Unalignable("a TextGrid without words in a tier named words")
        if of_cut is None:  # its times are those of the recording, of which the cut may be a part
            own = [w._replace(begin=w.begin - cut.start, end=w.end - cut.start) for w in words]
            words = [word for word in own if word.end > 0 and word.begin < cut.duration] if cut.start else own
        if not words or max(word.end for word in words) > cut.duration + BEYOND_SECONDS:
            raise Unalignable("a TextGrid with words beyond the audio")
        speakers = {supervision.speaker for supervision in cut.supervisions} - {None}
        by_time = sorted(cut.supervisions, key=lambda supervision: supervision.start)
        at_once = any(one.end > other.start + BEYOND_SECONDS for one, other in pairwise(by_time))
        if at_once and not {word.speaker for word in words} <= speakers:
            raise Unalignable("people talk at once, and the TextGrid's tiers are not called like the speakers")
        return [SpeakersWord(*word) for word in words]
