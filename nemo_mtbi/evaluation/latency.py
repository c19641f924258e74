"""Time to the first token of an answer."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from lhotse import CutSet

from nemo_mtbi.data.audio import mono_samples
from nemo_mtbi.evaluation.asr import RATE, WhisperASR
from nemo_mtbi.evaluation.columns import CASCADE
from nemo_mtbi.models.mtbi_salm import MTBISALM


@torch.no_grad()
def seconds_to_first_token(
    model: MTBISALM, cuts: CutSet, prompt: str, count: int, asr: WhisperASR | None
) -> dict[str, float]:
    """Median seconds from the waveform in memory to the first token, one utterance at a time; systems take turns.

    The cascade (with ``asr``) transcribes, then the text LLM reads prompt and transcript. One utterance is a warm-up.
    """
    waveforms = list(islice(_readable(cuts), count + 1))
    if not waveforms:
        return {}

    def speech(waveform: Any) -> None:
        audio = torch.from_numpy(waveform)[None]
        model.generate([[model.user_turn(prompt)]], audio, torch.tensor([len(waveform)]), max_new_tokens=1)

    def cascade(waveform: Any) -> None:
        assert asr is not None
        model.generate([[model.text_turn(prompt, asr.transcripts([waveform])[0])]], max_new_tokens=1)

    systems: dict[str, Callable[[Any], None]] = {"speech LLM": speech} | ({CASCADE: cascade} if asr else {})
    seconds: dict[str, list[float]] = defaultdict(list)
    for waveform in waveforms:
        for name, run in systems.items():
            begin = time.perf_counter()
            run(waveform)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}


def _readable(cuts: CutSet) -> Iterator[Any]:
    """Mono samples of the cuts that can be read."""
    for cut in cuts:
        try:
            yield mono_samples(cut, RATE)
        except Exception:  # decoders raise their own types; the sets' figures count them as missing
            continue
