"""Answers in Python: any rate and channel count, batches, bad audio and dialogs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from transformers import GenerationConfig

from nemo_mtbi.data.audio import waveform
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


def test_several_threads_ask_one_model(exported):
    model = MTBISALM.restore_from(exported[1]).float()
    audios = 0.1 * torch.randn(4, 16000)
    alone = [model.chat(audio, "Repeat this.", max_new_tokens=8) for audio in audios]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda audio: model.chat(audio, "Repeat this.", max_new_tokens=8), audios))
    within = [model.chat(audios[1], "Repeat this.", max_new_tokens=8) for _ in model.stream(audios[0], "Repeat this.")]
    assert together == alone and set(within) <= {alone[1]}


def test_answers_are_greedy_whatever_the_llms_own_file_says(exported):
    model = MTBISALM.restore_from(exported[1]).float()
    audio = 0.1 * torch.randn(16000)
    greedy = model.chat(audio, "Repeat this.", max_new_tokens=12)
    model.llm.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=1.5)
    assert {model.chat(audio, "Repeat this.", max_new_tokens=12) for _ in range(3)} == {greedy}
    drawn = {model.chat(audio, "Repeat this.", max_new_tokens=12, do_sample=True) for _ in range(3)}
    assert len(drawn) > 1


def test_a_generation_config_keeps_its_limit_and_gets_the_ends_of_answers(exported):
    model = exported[0]
    own = GenerationConfig(max_new_tokens=140, min_new_tokens=140, num_beams=2)
    asked = model._generation_config(own)
    assert asked.eos_token_id == model.stop_ids() and asked.num_beams == 2 and own.eos_token_id is None
    assert model.generate([[model.user_turn("What?", 0)]], generation_config=own).shape[1] == 140
    answer = model.chat([], "What?", generation_config=own)
    assert len(model.tokenizer.tokenizer(answer)["input_ids"]) > 128


@pytest.mark.parametrize("shape", [(-1,), (1, -1), (-1, 1)])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.int32])
def test_waveforms_as_programs_hold_them(exported, shape, kind):
    samples = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    full = -float(np.iinfo(kind).min) if np.issubdtype(kind, np.integer) else 1.0
    given = (samples * full).astype(kind).reshape(shape)
    for held in (given, torch.from_numpy(given)):
        np.testing.assert_allclose(waveform(held), samples, atol=1e-4)
    assert exported[0].chat(given, "What?", max_new_tokens=3) == exported[0].chat(samples, "What?", max_new_tokens=3)


@pytest.mark.parametrize(
    "samples, message",
    [
        (np.full(16000, np.nan, np.float32), "no numbers"),
        (1e9 * np.ones(16000, np.float32), "level"),
        (np.zeros((2, 16000), np.float32), r"shape \(2, 16000\)"),
        (np.zeros(16000, np.uint8), "uint8"),
        (np.zeros(16000, np.complex64), "complex64"),
        (np.float32(0), "shape"),
    ],
)
def test_what_is_no_waveform_is_refused(exported, samples, message):
    with pytest.raises(DataError, match=message):
        exported[0].chat(torch.as_tensor(samples), "What?")
    if samples.ndim == 1:
        with pytest.raises(DataError, match=message):
            exported[0].listen(torch.as_tensor(samples)[None], torch.tensor([16000]))
