"""What strangers send: long texts, files that are not theirs, audio that costs more than it holds."""

import io
import time
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from nemo_mtbi.data.audio_inputs import audio_inputs
from nemo_mtbi.data.audio_length import with_length
from nemo_mtbi.data.audio_stream import AudioStream, open_audio, seconds_of
from nemo_mtbi.data.chat_template import chat_template
from nemo_mtbi.errors import DataError
from nemo_mtbi.examples._generate_arguments import to_overrides
from nemo_mtbi.registration import PromptFormatter
from nemo_mtbi.serving import written
from nemo_mtbi.serving.audio import decode_audio
from nemo_mtbi.serving.batching import Batcher, QueueFull
from nemo_mtbi.serving.limits import Limits
from nemo_mtbi.serving.request import Request
from nemo_mtbi.serving.sampling import Sampling, TokenScore
from tests.helpers import build

pytestmark = pytest.mark.unit
LONG_QUESTION = "Was wird hier über die Lage gesagt? " * 30


def encoded(samples, rate, format):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()


def test_the_page_opens_uploads_alone(tiny_config, tmp_path):
    pytest.importorskip("gradio", reason="the page needs the extra: pip install 'nemo_mtbi[serve]'")
    from fastapi.testclient import TestClient

    from nemo_mtbi.serving.openai_api import create_app
    from nemo_mtbi.serving.page import mount_page

    private = tmp_path / "private.wav"
    soundfile.write(private, np.zeros(16000), 16000)
    model = build(tiny_config)
    batcher = Batcher(model)
    app = mount_page(create_app(model, "tiny", batcher, Limits()), model, batcher, Limits(), None, [])
    with TestClient(app) as client:
        for path in (private, "/etc/passwd", "/dev/zero"):
            body = {"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}, "Repeat.", 8]}
            answer = client.post("/gradio_api/call/ask", json=body)
            if answer.status_code == 200:
                answer = client.get(f"/gradio_api/call/ask/{answer.json()['event_id']}")
                assert "event: error" in answer.text and "complete" not in answer.text
        uploaded = client.post("/gradio_api/upload", files={"files": ("a.wav", private.read_bytes())}).json()[0]
        body = {"data": [{"path": uploaded, "meta": {"_type": "gradio.FileData"}}, "Repeat.", 8]}
        number = client.post("/gradio_api/call/ask", json=body).json()["event_id"]
        assert "event: complete" in client.get(f"/gradio_api/call/ask/{number}").text


def test_the_page_has_the_endpoints_limit_of_text(tiny_config):
    gr = pytest.importorskip("gradio", reason="the page needs the extra: pip install 'nemo_mtbi[serve]'")
    from nemo_mtbi.serving.page import Page

    page = Page(build(tiny_config), None, Limits(max_text_characters=100), None)
    for prompt, said in (("a" * 101, "hello"), ("Repeat.", "a" * 101)):
        with pytest.raises(gr.Error, match="101 characters"):
            next(page.text(said, prompt, 8))


def test_the_page_offers_no_empty_prompt(tiny_config):
    pytest.importorskip("gradio", reason="the page needs the extra: pip install 'nemo_mtbi[serve]'")
    from nemo_mtbi.serving.page import Page
    from nemo_mtbi.serving.page import build as page_of

    blocks = page_of(Page(build(tiny_config), None, Limits(), None), [])
    [choices] = [
        c["props"]["choices"]
        for c in blocks.config["components"]
        if c["props"].get("elem_id") is None and c["type"] == "dropdown"
    ]
    assert choices and all(text.strip() for _, text in choices)


@pytest.mark.parametrize("question", [LONG_QUESTION, "Is it 3.5? " * 40, "ü" * 200 + ".wav"])
def test_questions_may_be_longer_than_a_file_name(question):
    values = to_overrides(["model.nemo", "a.wav", question])
    assert any(value.startswith("prompt=") for value in values)
    [found] = audio_inputs(question)
    assert found.problem.startswith("There is no audio file")


def test_a_question_from_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "q.txt").write_bytes("\ufeffWhat is it?\r\n".encode())
    values = to_overrides(["model.nemo", "a.wav", "--prompt-file", str(tmp_path / "q.txt")])
    assert any(value.startswith("prompt=") and "ufeff" not in value and "\ufeff" not in value for value in values)
    assert any("What is it?" in value for value in values)


def test_hours_without_a_length_cost_little_before_a_limit():
    """Of an hour of silence, a FLAC whose header says nothing."""
    data = bytearray(encoded(np.zeros(8000 * 3600, np.int16), 8000, "FLAC"))
    field = int.from_bytes(data[18:26]) & ~((1 << 36) - 1)
    data[18:26] = field.to_bytes(8)
    begin = time.process_time()
    with pytest.raises(DataError, match="longer than 60 s"):
        decode_audio(bytes(data), 16_000, 60.0)
    assert time.process_time() - begin < 2
    begin = time.process_time()
    counted = soundfile.info(io.BytesIO(with_length(bytes(data)))).duration
    assert counted == pytest.approx(3600, abs=0.011) and time.process_time() - begin < 5


def test_the_form_of_audio_is_checked_before_it_is_counted():
    data = bytearray(encoded(np.zeros((16000, 1), np.int16), 200_000, "FLAC"))
    data[18:26] = (int.from_bytes(data[18:26]) & ~((1 << 36) - 1)).to_bytes(8)
    with pytest.raises(DataError, match="sampling rate is 200,000"):
        decode_audio(bytes(data), 16_000, 60.0)


def test_a_wav_that_was_written_to_a_pipe(tmp_path):
    data = bytearray(encoded(0.1 * np.ones(16000), 16000, "WAV"))
    at = data.find(b"data")
    data[at + 4 : at + 8] = bytes(4)
    (tmp_path / "a.wav").write_bytes(data)
    assert seconds_of(open_audio(tmp_path / "a.wav", 16_000), 16_000) == pytest.approx(1.0)
    [samples] = decode_audio(bytes(data), 16_000, 60.0)
    assert len(samples) == 16000


def opened(data, rate=16000):
    """An MP3 in blocks, and how often it was opened."""
    stream, count = AudioStream(bytes(data), rate), []
    plain = stream.open

    def counted():
        count.append(1)
        return plain()

    stream.open = counted
    return stream, count


def test_a_download_that_ended_half_way_is_silence_from_there():
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000 * 60)
    data = bytearray(encoded(noise, 16000, "MP3"))
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    stream, count = opened(data)
    samples = np.concatenate(list(stream))
    assert len(samples) == pytest.approx(16000 * 60, abs=16000)
    assert stream.gaps and stream.gaps[-1].end_seconds - stream.gaps[0].begin_seconds > 25
    assert len(count) < 60


def test_a_decoder_past_its_end_is_a_gap(monkeypatch):
    data = encoded(0.1 * np.ones(16000 * 130), 16000, "WAV")
    plain = soundfile.SoundFile.read

    def read(self, frames, **options):
        if self.tell() >= 16000 * 60:
            raise ValueError("negative dimensions are not allowed")
        return plain(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    stream = AudioStream(data, 16000)
    assert len(np.concatenate(list(stream))) == 16000 * 130 and stream.gaps[0].begin_seconds == pytest.approx(60, abs=1)


def test_what_is_between_holes_is_read(monkeypatch):
    """Some long ones near each other, and many short ones."""
    data = encoded(0.1 * np.random.default_rng(0).standard_normal(16000 * 600), 16000, "WAV")
    holes = [(100, 104), (160, 170), *((200 + 3 * n, 201 + 3 * n) for n in range(70))]
    plain = soundfile.SoundFile.read

    def read(self, frames, **options):
        begin, end = self.tell() / 16000, (self.tell() + frames) / 16000
        if any(begin < high and low < end for low, high in holes):
            raise RuntimeError("a hole")
        return plain(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    stream = AudioStream(data, 16000)
    samples = np.concatenate(list(stream))
    silent = {second for second in range(600) if not samples[second * 16000 : (second + 1) * 16000].any()}
    assert silent == {second for low, high in holes for second in range(low, high)}


def test_names_that_are_no_utf8(tmp_path):
    import os

    name = os.fsencode(tmp_path) + b"/\xe9t\xe9.wav"
    soundfile.write(io_name := tmp_path / "a.wav", 0.1 * np.ones(16000 * 130), 16000)
    os.rename(io_name, name)
    [found] = list(audio_inputs(tmp_path))
    assert seconds_of(found.open(16_000), 16_000) == pytest.approx(130)


def test_of_several_chat_templates_the_default_one_is_exported(smollm2):
    from nemo.collections.common.tokenizers import AutoTokenizer

    tokenizer = AutoTokenizer(smollm2, use_fast=True)
    own = tokenizer.tokenizer.chat_template
    tokenizer.tokenizer.chat_template = {"default": own, "tool_use": "{{ messages }}"}
    assert chat_template(tokenizer, PromptFormatter.resolve("chat_template")) == own


def test_long_requests_that_were_taken_from_the_queue_wait_too(tiny_config):
    batcher = Batcher(build(tiny_config), max_waiting=4)
    batcher._serve = lambda batch: time.sleep(60)  # busy
    audio = AudioStream(encoded(np.zeros(16000 * 300), 16000, "FLAC"), 16_000)

    def request():
        return Request([], [audio], 8, print, print, Sampling())

    batcher.submit(request())
    time.sleep(0.3)
    with pytest.raises(QueueFull, match="4 requests"):
        for _ in range(8):
            batcher.submit(request())
            batcher._next(short=True)
    assert batcher.waits == 4


def test_a_tokens_text_is_looked_up_once(smollm2):
    from transformers import AutoTokenizer

    tokenizer, calls = AutoTokenizer.from_pretrained(smollm2), []
    plain = tokenizer.decode
    tokenizer.decode = lambda *a, **k: calls.append(1) or plain(*a, **k)
    top = [(token, -1.0) for token in range(300, 320)]
    found = written.scores(tokenizer, [TokenScore(300, -1.0, top)] * 50)
    assert len(found) == 50 and len(calls) <= 2 * 20
    assert found[0]["token"] == found[0]["top_logprobs"][0]["token"]


def test_clients_that_have_left_do_not_wait(tiny_config):
    batcher = Batcher(build(tiny_config), max_waiting=2)
    batcher._serve = lambda batch: time.sleep(60)  # busy

    def request():
        return Request([], [], 8, print, print, Sampling())

    batcher.submit(request())
    time.sleep(0.3)
    left = [request() for _ in range(2)]
    batcher.submit(*left)
    with pytest.raises(QueueFull, match="2 requests"):
        batcher.submit(request())
    for one in left:
        one.cancel()
    batcher.submit(request())
    assert batcher.waits == 1


@pytest.mark.parametrize(("path", "size"), [("/v1/x", 1_001), ("/gradio_api/queue/join", 2**21)])
def test_bodies_have_a_limit_everywhere(path, size):
    testclient = pytest.importorskip("fastapi.testclient", reason="needs the extra: pip install 'nemo_mtbi[serve]'")
    from fastapi import FastAPI

    from nemo_mtbi.serving.limits import BodyLimit

    app = FastAPI()
    app.add_middleware(BodyLimit, limit=1_000)
    app.post(path)(lambda: "taken")
    client = testclient.TestClient(app)
    assert client.post(path, content=b"x" * 1_000).status_code == 200
    assert client.post(path, content=b"x" * size).status_code == 413


def test_parts_of_a_character_have_their_bytes(smollm2):
    from transformers import AutoTokenizer

    tokenizer, text = AutoTokenizer.from_pretrained(smollm2), "né 日本 😀"
    ids = tokenizer(text)["input_ids"]
    found = written.scores(tokenizer, [TokenScore(token, -1.0, []) for token in ids])
    assert any("\ufffd" in one["token"] for one in found)
    assert bytes(byte for one in found for byte in one["bytes"]).decode() == text
    sentencepiece = SimpleNamespace(convert_ids_to_tokens=lambda token: ["<0xE2>", "▁é"][token])
    assert written.bytes_within(sentencepiece, 0) == [0xE2] and written.bytes_within(sentencepiece, 1) is None


def test_audio_beyond_the_limit_is_not_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000 * 60), 16000)
    monkeypatch.setattr("nemo_mtbi.data.audio.mono_samples", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="60 s of audio; the limit here is 30 s"):
        open_audio(tmp_path / "a.wav", 16000, longest=30.0)


def test_a_server_whose_worker_has_stopped_is_not_healthy(tiny_config):
    pytest.importorskip("fastapi", reason="the endpoint needs the extra: pip install 'nemo_mtbi[serve]'")
    from fastapi.testclient import TestClient

    from nemo_mtbi.serving.openai_api import create_app

    model = build(tiny_config)
    batcher = Batcher(model)
    with TestClient(create_app(model, "tiny", batcher, Limits())) as client:
        assert client.get("/health").status_code == 200
        batcher.thread = Thread(target=print)
        assert client.get("/health").status_code == 503 and client.get("/health").json()["status"] == "stopped"
