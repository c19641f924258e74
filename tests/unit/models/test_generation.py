"""Answers in Python: any rate and channel count, batches, bad audio and dialogs."""

import numpy as np
import pytest
import soundfile
import torch

from nemo_mtbi.errors import DataError
from nemo_mtbi.models import MTBISALM

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("rate, channels", [(8000, 1), (22050, 2), (44100, 1), (48000, 2)])
def test_chat_takes_any_rate_and_channel_count(exported, tmp_path, rate, channels):
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((rate, channels)), rate)
    assert isinstance(exported[0].chat(path, "What?", max_new_tokens=3), str)


def test_bad_audio_and_dialogs_are_refused(exported, tmp_path):
    model = exported[0]
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", np.zeros(10), 16000)
    for name, message in (("absent", "There is no audio"), ("text", "cannot be read as audio"), ("short", "at least")):
        with pytest.raises(DataError, match=message):
            model.chat(tmp_path / f"{name}.wav", "What?")
    with pytest.raises(DataError, match="Write one tag for each audio"):
        model.generate([[{"role": "user", "content": "No tag."}]], torch.zeros(1, 16000), torch.tensor([16000]))


def test_generation_in_a_batch_equals_one_by_one(exported):
    model = MTBISALM.restore_from(exported[1]).float()
    audio, lengths = 0.1 * torch.randn(3, 20000), torch.tensor([20000, 12000, 9000])
    prompts = [[model.user_turn(p)] for p in ("Repeat this.", "What is it about, in one sentence?", "Say it.")]
    together = model.generate(prompts, audio, lengths, max_new_tokens=6, do_sample=False)
    for row in range(3):
        own = audio[row : row + 1, : lengths[row]]
        alone = model.generate(prompts[row : row + 1], own, lengths[row : row + 1], max_new_tokens=6, do_sample=False)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()
