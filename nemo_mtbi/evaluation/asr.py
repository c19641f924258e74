"""The cascade's first half: Whisper transcripts of the evaluated audio, with the decoder at its full 30 s windows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut
from tqdm import tqdm

from nemo_mtbi.data import jsonl
from nemo_mtbi.data.audio import mono_samples
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models.encoder import is_whisper
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained

RATE, WINDOW_SECONDS = 16_000, 30


class WhisperASR:
    """Greedy Whisper transcription; results are kept in ``cache`` and reused.

    Args:
        name: Whisper model (``offline:``, hub name or path).
        cache: JSONL file of transcripts.
        batch_size: windows decoded together.

    Raises:
        ConfigError: the model is not Whisper.
    """

    def __init__(self, name: str, cache: Path, batch_size: int = 16) -> None:
        self.path = resolve_pretrained(name)
        if not is_whisper(self.path):
            raise ConfigError(f"The cascade needs a Whisper model, {name} is none; set cascade=false.")
        self.cache, self.batch_size = cache, batch_size
        self.key = fingerprint(self.path)

    def transcribe(self, cuts: list[Cut]) -> dict[str, str]:
        """Transcripts by cut id."""
        jsonl.repair(self.cache)
        done = {r["id"]: r["text"] for r in jsonl.read(self.cache) if r["asr"] == self.key}
        missing = sorted((c for c in cuts if c.id not in done), key=lambda c: c.duration)
        if missing:
            from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model: Any = WhisperForConditionalGeneration.from_pretrained(self.path)
            model = model.to(device).eval()
            extractor = WhisperFeatureExtractor.from_pretrained(self.path)
            tokenizer = WhisperTokenizer.from_pretrained(self.path)
            with jsonl.Appender(self.cache) as out, tqdm(total=len(missing), desc="cascade ASR", unit="utt") as bar:
                for begin in range(0, len(missing), self.batch_size):
                    batch = missing[begin : begin + self.batch_size]
                    windows = [w for c in batch for w in _windows(c)]
                    features = extractor(
                        [w for _, w in windows], sampling_rate=RATE, return_tensors="pt"
                    ).input_features
                    with torch.no_grad():
                        ids = model.generate(input_features=features.to(device))
                    texts: dict[str, list[str]] = {}
                    for (cut_id, _), text in zip(
                        windows, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True
                    ):
                        texts.setdefault(cut_id, []).append(text.strip())
                    for cut in batch:
                        done[cut.id] = " ".join(texts[cut.id]).strip()
                        out.write({"id": cut.id, "asr": self.key, "text": done[cut.id]})
                    bar.update(len(batch))
        return done


def _windows(cut: Cut) -> list[tuple[str, np.ndarray]]:
    samples = mono_samples(cut, RATE)
    size = WINDOW_SECONDS * RATE
    return [(cut.id, samples[i : i + size]) for i in range(0, max(1, len(samples)), size)]
