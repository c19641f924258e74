"""The cascade's recognizer."""

from types import SimpleNamespace

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


def test_a_multilingual_recognizer_is_told_the_connectors_language(tiny_whisper, tiny_config):
    told = WhisperASR(str(tiny_whisper), "de")
    assert told.options == {}  # English alone
    told.parts[0].generation_config.is_multilingual = True
    assert told.options == {"task": "transcribe", "language": "de"}
    assert told.key != WhisperASR(str(tiny_whisper)).key  # transcripts of a guessed language are other ones
    perception = tiny_config["perception"]
    adapter = perception["modality_adapter"] | {"language": "fr"}
    config = SimpleNamespace(pretrained_asr=str(tiny_whisper), perception=perception | {"modality_adapter": adapter})
    assert WhisperASR.beside(config).language == "fr"


def test_windows_of_scripts_without_spaces_are_joined_without_one(tiny_whisper, monkeypatch):
    asr = WhisperASR(str(tiny_whisper))
    monkeypatch.setattr(asr.parts[2], "batch_decode", lambda ids, **_: ["我们", "去"][: len(ids)])
    assert asr.transcripts([0.1 * np.ones(16000 * 40, np.float32)]) == ["我们去"]
