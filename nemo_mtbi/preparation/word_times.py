"""Word times by forced alignment.

An aligner gives one :class:`TimedWord` per word of the transcript, or says why not.
"""

import difflib
import re
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lhotse.cut import Cut

from nemo_mtbi.data.alignments import BEYOND_SECONDS, WORDS, set_words
from nemo_mtbi.data.rendering import TimedWord
from nemo_mtbi.errors import ConfigError, DataError

ALIGNER_RATE = 16_000


class Unalignable(Exception):
    """The reason why an utterance has no word times."""


class Aligner(Protocol):
    """``align`` takes float32 mono samples at 16 kHz and the transcript.

    Raises:
        Unalignable: with the reason.
    """

    def align(self, samples: np.ndarray, transcript: str) -> list[TimedWord]: ...


class PocketSphinxAligner:
    """CMU PocketSphinx (BSD): offline, English, 0.01 x real time. Words outside its dictionary get no times.

    Unknown words are left out of the aligned text; their neighbours keep their times.
    """

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
        if not known:
            raise Unalignable("no word of the transcript is in PocketSphinx's dictionary")
        if len(known) < 0.5 * len(words):
            raise Unalignable(f"{len(words) - len(known)} of {len(words)} words are not in PocketSphinx's dictionary")
        pcm = (np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes()
        try:
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

    Args:
        model: NeMo ASR model, name or .nemo.
    """

    def __init__(self, model: str) -> None:
        from nemo.collections.asr.models import ASRModel

        load = ASRModel.restore_from if model.endswith(".nemo") else ASRModel.from_pretrained
        try:
            self.model = load(model).eval()
        except Exception as error:  # of NeMo, of a hub, of an archive
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"aligner={model!r} cannot be loaded: {reason[:200]}.") from error
        self.seconds = self.model.cfg.preprocessor.window_stride * self.model.encoder.subsampling_factor

    def align(self, samples: np.ndarray, transcript: str) -> list[TimedWord]:
        from nemo.collections.asr.parts.utils import aligner_utils as nemo

        variables = nemo.get_batch_variables(
            audio=[samples],
            model=self.model,
            gt_text_batch=[transcript],
            output_timestep_duration=self.seconds,
            verbose=False,
        )
        log_probs, tokens, frames, token_counts, utterances, seconds = variables
        if int(token_counts[0]) <= 1:  # NeMo leaves one blank of a transcript that does not fit
            raise Unalignable("NeMo found more tokens in the transcript than frames in the audio")
        path = nemo.viterbi_decoding(log_probs, tokens, frames, token_counts, self.model.device)[0]
        utterance = nemo.add_t_start_end_to_utt_obj(utterances[0], path, seconds)
        words = [w for s in utterance.segments_and_tokens if isinstance(s, nemo.Segment) for w in s.words_and_tokens]
        return [TimedWord(w.text, w.t_start, w.t_end) for w in words if isinstance(w, nemo.Word)]


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


def give_words(cut: Cut, words: list[TimedWord]) -> None:
    """The words of a cut's transcript to its supervisions, in their order; those that have words keep theirs."""
    counts = [len((supervision.text or "").split()) for supervision in cut.supervisions]
    if len(counts) == 1 or sum(counts) != len(words):  # a TextGrid may have other words than the transcript
        ends = [supervision.end for supervision in cut.supervisions[:-1]]
        owners = [sum((w.end_seconds or 0.0) > end for end in ends) for w in words]
        counts = [owners.count(index) for index in range(len(counts))]
    place = 0
    for supervision, count in zip(cut.supervisions, counts, strict=True):
        own, place = words[place : place + count], place + count
        if not (supervision.alignment or {}).get(WORDS):
            set_words(supervision, own, cut.start)


def words_of_grid(file: Path) -> list[tuple[str, float, float]]:
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
        intervals = [i for tier in grid if tier.name == "words" or tier.name.endswith(" - words") for i in tier]
        marked = [(str(i.mark).strip(), float(i.minTime), float(i.maxTime)) for i in intervals]
    except Exception as error:  # of any kind, about a file of another tool
        raise Unalignable(f"no TextGrid ({type(error).__name__}: {str(error)[:100]})") from None
    return sorted((w for w in marked if w[0] and not w[0].startswith("<")), key=lambda w: w[1])


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

    def words(self, cut: Cut) -> list[TimedWord]:
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
            own = [(w, a - cut.start, b - cut.start) for w, a, b in words]
            words = [word for word in own if word[2] > 0 and word[1] < cut.duration] if cut.start else own
        if not words or max(b for _, _, b in words) > cut.duration + BEYOND_SECONDS:
            raise Unalignable("a TextGrid with words beyond the audio")
        return [TimedWord(*word) for word in words]
