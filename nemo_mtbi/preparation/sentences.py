"""The ``sentences`` source: plain text spoken by synthetic voices, split by sentence and by voice."""

import hashlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from lhotse import Recording
from lhotse.cut import Cut

from nemo_mtbi import console
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io.text import normalized, numbered_lines
from nemo_mtbi.io.typed import typed
from nemo_mtbi.preparation.everyday import everyday_sentences
from nemo_mtbi.preparation.sources import Entry, SourceConfig, utterance_cut
from nemo_mtbi.preparation.synthesis import Voice, parse_voice, synthesize


@dataclass
class SentenceOptions:
    """``options`` of a ``sentences`` source.

    Attributes:
        voices: voices of the training and held-out utterances (see :mod:`nemo_mtbi.preparation.synthesis`).
        unseen_voices: voices that speak held-out sentences only, in split ``unseen_voice``.
        count: sentences drawn from the built-in grammar (``path: everyday``); a text file gives all of its lines.
        held_out: sentences that are not trained on.
        held_out_split: split of those in the voices of the training; null: they are spoken by unseen voices alone.
        normalized: transcripts in lower case without punctuation, to go with corpora that write so.
        renditions: different voices for each training sentence.
        speeds: factors of Lhotse's speed perturbation (pitch changes with it), one drawn for each utterance.
        snr_db: signal-to-noise ratios of white noise mixed in by Lhotse, one drawn for each utterance; null is no
            noise.
        seed: of the draws.
    """

    voices: list[str] = field(default_factory=lambda: ["piper:joe"])
    unseen_voices: list[str] = field(default_factory=list)
    count: int = 1000
    held_out: int = 60
    held_out_split: str | None = "held_out"
    normalized: bool = False
    renditions: int = 1
    speeds: list[float] = field(default_factory=lambda: [1.0])
    snr_db: list[float | None] = field(default_factory=lambda: [None])
    seed: int = 0


def read_sentences(config: SourceConfig, output_dir: Path) -> Iterator[Entry]:
    """Synthesizes what is missing (with a progress bar), then yields the utterances."""
    options = typed(SentenceOptions, config.options, "sources.options of kind sentences")
    least = {"count": 1, "held_out": 0, "renditions": 1}
    wrong = [f"{name}={getattr(options, name)}" for name, value in least.items() if getattr(options, name) < value]
    wrong += [f"{name}=[]" for name in ("voices", "speeds", "snr_db") if not getattr(options, name)]
    wrong += [f"speeds={options.speeds}" for speed in options.speeds if not 0.5 <= speed <= 2][:1]
    if wrong:
        raise ConfigError(f"sources.options of kind sentences: {wrong[0]} gives no sentences.")
    voices = [parse_voice(v) for v in options.voices]
    unseen = [parse_voice(v) for v in options.unseen_voices]
    sentences = _sentences(config, options)
    if len(sentences) <= options.held_out:
        raise DataError(f"{len(sentences)} sentences leave none to train on with held_out={options.held_out}.")
    rng = random.Random(options.seed)
    plan: list[tuple[str, Voice, str]] = []
    for index, text in enumerate(sentences):
        if index < options.held_out:
            plan += [(text, rng.choice(voices), options.held_out_split)] if options.held_out_split else []
            plan += [(text, rng.choice(unseen), "unseen_voice")] if unseen else []
        else:
            plan += [(text, v, "train") for v in rng.sample(voices, min(options.renditions, len(voices)))]
    folder = output_dir / "audio"
    jobs: dict[Voice, list[tuple[str, Path]]] = {}
    for text, voice, _ in plan:
        path = _path(folder, text, voice)
        if not path.exists():
            jobs.setdefault(voice, []).append((text, path))
    with console.progress(
        total=sum(map(len, jobs.values())), desc="speech synthesis", unit="utt", disable=not jobs
    ) as bar:
        for voice, todo in jobs.items():
            for _ in synthesize(voice, todo):
                bar.update()
    for text, voice, split in plan:
        path = _path(folder, text, voice)
        written = normalized(text) if options.normalized else text
        draw = random.Random(f"{options.seed}/{path.stem}/{split}")
        speed, snr = draw.choice(options.speeds), draw.choice(options.snr_db)
        entry_id = path.stem + ("" if speed == 1 else f"-sp{speed}") + ("" if snr is None else f"-snr{snr}")

        def load(
            path: Path = path,
            text: str = written,
            voice: Voice = voice,
            name: str = entry_id,
            speed: float = speed,
            snr: float | None = snr,
        ) -> Cut:
            audio = path if name == path.stem else augmented(path, path.with_name(f"{name}.flac"), speed, snr)
            return utterance_cut(name, audio, text, voice.name, config.language or "en")

        yield Entry(entry_id, load, voice.name, written, split)


def augmented(source: Path, target: Path, speed: float, snr: float | None) -> Path:
    """``source`` with Lhotse's speed perturbation and white noise at ``snr`` dB, as a FLAC file; made once."""
    if not target.exists():
        cut = Recording.from_file(source).to_cut()
        if speed != 1:
            cut = cut.perturb_speed(speed)
        if snr is not None:
            samples = (
                np.random.default_rng(list(target.stem.encode())).standard_normal(cut.num_samples).astype(np.float32)
            )
            with tempfile.TemporaryDirectory() as folder:
                soundfile.write(Path(folder) / "noise.wav", 0.1 * samples, cut.sampling_rate)
                noise = Recording.from_file(Path(folder) / "noise.wav").to_cut()
                cut = cut.mix(noise, snr=snr).move_to_memory(audio_format="wav")
        temporary = target.with_name(f".{target.stem}.part.flac")
        cut.save_audio(str(temporary))
        temporary.replace(target)
    return target


def _sentences(config: SourceConfig, options: SentenceOptions) -> list[str]:
    if config.path in (None, "everyday"):
        return everyday_sentences(options.count, options.seed)
    assert config.path is not None
    path = Path(config.path)
    if not path.is_file():
        raise DataError(f"Source sentences: {path} does not exist (one sentence a line, or path: everyday).")
    return list(dict.fromkeys(line.strip() for _, line in numbered_lines(path, config.encoding)))


def _path(folder: Path, text: str, voice: Voice) -> Path:
    digest = hashlib.blake2b(f"{voice.name}\n{text}".encode(), digest_size=8).hexdigest()
    return folder / f"{voice.engine}-{digest}.wav"
