"""The cascade's first half: Whisper transcripts of the evaluated audio, with the decoder at its full 30 s windows."""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut

from nemo_mtbi import console
from nemo_mtbi.config import ModelConfig
from nemo_mtbi.data.audio import mono_samples
from nemo_mtbi.data.audio_windows import audio_windows
from nemo_mtbi.data.feature_cache import features_key
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.text import in_one
from nemo_mtbi.modules.perception import is_whisper
from nemo_mtbi.modules.whisper import HOP_SAMPLES, SAMPLE_RATE, SUBSAMPLING, WINDOW_SECONDS
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained

log = logging.getLogger(__name__)

RATE = SAMPLE_RATE


class WhisperASR:
    """Greedy Whisper transcription.

    Args:
        name: Whisper model (``offline:``, hub name or path).
        language: of the speech, for a multilingual model, which else guesses one for each window.
        batch_size: windows decoded together.

    Raises:
        ConfigError: the model is not Whisper.
    """

    def __init__(self, name: str, language: str | None = None, batch_size: int = 16) -> None:
        self.path = resolve_pretrained(name)
        if not is_whisper(self.path):
            raise ConfigError(
                f"The cascade needs a Whisper model, {name} is none; set cascade=false (and, in "
                "benchmark, baseline=text_topline)."
            )
        self.batch_size = batch_size
        self.language = language
        self.key = "/".join(filter(None, [fingerprint(self.path), language]))

    @classmethod
    def beside(cls, config: ModelConfig) -> "WhisperASR":
        """The recognizer of a speech LLM, told the same language."""
        return cls(config.pretrained_asr, (config.perception.get("modality_adapter") or {}).get("language"))

    def transcribe(self, cuts: list[Cut], cache: Path) -> dict[str, str]:
        """Transcripts by cut id, kept in the JSONL file ``cache`` and reused for the same audio.

        Cuts whose audio cannot be read are left out, and logged.
        """
        jsonl.repair(cache)
        keys = {c.id: features_key(c, self.key) for c in cuts}
        done = {r["id"]: r["text"] for r in jsonl.read(cache) if keys.get(r["id"]) == r["audio"]}
        missing = sorted((c for c in cuts if c.id not in done), key=lambda c: c.duration)
        if not missing:
            return done
        with jsonl.Appender(cache) as out, console.progress(total=len(missing), desc="cascade ASR", unit="utt") as bar:
            for begin in range(0, len(missing), self.batch_size):
                batch = missing[begin : begin + self.batch_size]
                read = {c.id: w for c in batch if (w := _samples(c)) is not None}
                for cut_id, text in zip(read, self.transcripts(list(read.values())) if read else [], strict=True):
                    done[cut_id] = text
                    out.write({"id": cut_id, "audio": keys[cut_id], "text": text})
                bar.update(len(batch))
        return done

    @torch.no_grad()
    def transcripts(self, waveforms: list[np.ndarray]) -> list[str]:
        """Transcripts of waveforms (S,) at 16 kHz; longer ones than 30 s are cut as the speech LLM's are."""
        options = RATE, WINDOW_SECONDS * RATE, HOP_SAMPLES * SUBSAMPLING
        windows = [(k, w.samples) for k, own in enumerate(waveforms) for w in audio_windows([own], *options)]
        model, extractor, tokenizer = self.parts
        texts: list[list[str]] = [[] for _ in waveforms]
        for begin in range(0, len(windows), self.batch_size):
            part = windows[begin : begin + self.batch_size]
            features = extractor([w for _, w in part], sampling_rate=RATE, return_tensors="pt").input_features
            ids = model.generate(input_features=features.to(model.device), **self.options)
            for (k, _), text in zip(part, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                texts[k].append(text.strip())
        return [in_one(t) for t in texts]

    @property
    def options(self) -> dict[str, Any]:
        """What a multilingual model is told; the others refuse it."""
        if not getattr(self.parts[0].generation_config, "is_multilingual", False):
            return {}
        return {"task": "transcribe"} | ({"language": self.language} if self.language else {})

    @cached_property
    def parts(self) -> tuple[Any, Any, Any]:
        """Model, feature extractor and tokenizer, loaded when they are first needed."""
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

        model: Any = WhisperForConditionalGeneration.from_pretrained(self.path, dtype=torch.float32)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        extractor = WhisperFeatureExtractor.from_pretrained(self.path)
        return model, extractor, WhisperTokenizer.from_pretrained(self.path)


def _samples(cut: Cut) -> np.ndarray | None:
    try:
        return mono_samples(cut, RATE)
    except Exception as error:  # decoders raise their own types
        log.warning(f"{cut.id} is left out of the cascade: its audio cannot be read ({error}).")
        return None
