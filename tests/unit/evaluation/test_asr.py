"""The cascade's recognizer."""

import numpy as np
import pytest
import soundfile
from lhotse import Recording

from nemo_mtbi.evaluation.asr import WhisperASR

pytestmark = pytest.mark.unit


def test_the_cascade_leaves_unreadable_audio_out_and_hears_other_audio_anew(labels, tiny_whisper):
    cuts = [Recording.from_file(labels / f"{n}.wav").to_cut().with_id(n) for n in "ab"]
    (labels / "b.wav").write_text("broken")
    asr, cache = WhisperASR(str(tiny_whisper)), labels / "transcripts.jsonl"
    assert set(asr.transcribe(cuts, cache)) == {"a"}
    assert set(asr.transcribe(cuts, cache)) == {"a"} and len(cache.read_text().splitlines()) == 1
    soundfile.write(labels / "a.wav", 0.1 * np.ones(9000), 16000)
    asr.transcribe([Recording.from_file(labels / "a.wav").to_cut().with_id("a")], cache)
    assert len(cache.read_text().splitlines()) == 2
