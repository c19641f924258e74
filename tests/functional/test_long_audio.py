"""Minutes of audio through the endpoint, the page's buttons and `mtbi generate`; broken minutes; clients that leave."""

import base64
import io
import json
import queue
import threading
import time

import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.data.audio_stream import AudioStream
from nemo_mtbi.errors import DataError
from nemo_mtbi.models import generation
from nemo_mtbi.serving.batching import Batcher, QueueFull
from nemo_mtbi.serving.limits import Limits
from nemo_mtbi.serving.openai_api import create_app
from nemo_mtbi.serving.request import Listening, Piece, Request
from tests.helpers import build, served_config
from tests.launching import launch

pytestmark = pytest.mark.functional
RATE, SECONDS = 16_000, 600


@pytest.fixture(scope="module")
def model(tiny_llm, tiny_whisper):
    model = build(served_config(tiny_llm, tiny_whisper)).eval()
    model.limit_positions(50)
    return model


@pytest.fixture(scope="module")
def batcher(model):
    return Batcher(model)


@pytest.fixture(scope="module")
def client(model, batcher):
    return TestClient(create_app(model, "tiny", batcher, Limits(max_tokens=8, max_audio_seconds=700)))


@pytest.fixture(scope="module")
def recording():
    """Ten minutes of noise as FLAC."""
    file = io.BytesIO()
    samples = 0.1 * np.random.default_rng(0).standard_normal(SECONDS * RATE)
    soundfile.write(file, samples, RATE, format="FLAC")
    return file.getvalue()


@pytest.fixture(scope="module")
def broken(recording):
    """The seventh minute cannot be decoded."""
    data = bytearray(recording)
    middle = round(6.5 / 10 * len(data))
    data[middle : middle + 300_000] = bytes(300_000)
    return bytes(data)


def idle(batcher):
    """Wait until the model is at rest: the worker gives the embedding back after the last answer's end."""
    while batcher.kept:
        time.sleep(0.01)


def ask(client, data, **options):
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "flac"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it about?"}, audio]}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 5, **options}
    return client.post("/v1/chat/completions", json=body)


def test_ten_minutes_are_answered_from_the_positions_of_the_budget(client, model, recording):
    answer = ask(client, recording).json()
    samples, _ = soundfile.read(io.BytesIO(recording), dtype="float32")
    expected = model.chat(samples, "What is it about?", max_new_tokens=5, do_sample=False)
    assert answer["choices"][0]["message"]["content"] == expected
    empty = model.generation_inputs(model.prompt_pieces([[model.user_turn("What is it about?", 0)]])[0], None, None)
    assert 50 <= answer["usage"]["prompt_tokens"] <= 50 + empty[0].shape[1] + 4 and "audio_gaps" not in answer


def test_the_stream_says_how_much_is_heard(client, recording):
    lines = ask(client, recording, stream=True).text.split("\n\n")
    heard = [int(line[2:].split("%")[0]) for line in lines if line.startswith(": ")]
    assert len(heard) >= 2 and heard == sorted(heard) and heard[-1] == 100
    first = next(i for i, line in enumerate(lines) if '"content": "' in line and '"content": ""' not in line)
    assert all(not line.startswith(": ") for line in lines[first:]) and lines[-2:] == ["data: [DONE]", ""]


def test_a_broken_minute_is_named_and_the_rest_answered(client, broken):
    answer = ask(client, broken).json()
    (gap,) = answer["audio_gaps"]
    assert gap["audio"] == 0 and 360 < gap["begin_seconds"] < gap["end_seconds"] < 440 and gap["reason"]
    last = [json.loads(x[6:]) for x in ask(client, broken, stream=True).text.split("\n\n") if '"finish_reason": "' in x]
    assert last[0]["audio_gaps"] == answer["audio_gaps"]
    form = {"model": "tiny", "response_format": "verbose_json"}
    result = client.post("/v1/audio/transcriptions", files={"file": ("a.flac", broken)}, data=form).json()
    assert result["audio_gaps"] == answer["audio_gaps"] and result["duration"] == pytest.approx(SECONDS)


def test_more_than_the_limit_is_refused_before_it_is_decoded(client, recording):
    samples, rate = np.zeros(701 * 8000, np.float32), 8000
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    refused = ask(client, file.getvalue())
    assert refused.status_code == 413 and "longer than 700 s" in refused.json()["error"]["message"]
    header = recording[:200_000]  # promises ten minutes, holds seconds: its gap is named
    (gap,) = ask(client, header).json()["audio_gaps"]
    assert gap["begin_seconds"] < 30 and gap["end_seconds"] == SECONDS


def test_audio_of_which_nothing_can_be_read_is_an_error(client, recording):
    headers = bytearray(recording[:100])
    answer = ask(client, bytes(headers) + bytes(3000))
    assert answer.status_code == 400, answer.text
    assert "Nothing of the audio can be read" in answer.json()["error"]["message"]


def test_more_positions_than_the_context_are_refused(model, recording):
    budget, model.perception.fusion = model.perception.fusion, None
    try:
        with pytest.raises(DataError, match=r"take 6\d{3} positions of the LLM, whose context has 2048.*max_positions"):
            model.generate([[model.user_turn("What?")]], [AudioStream(recording, RATE)], max_new_tokens=2)
    finally:
        model.perception.fusion = budget


def test_nobody_is_listened_to_for_a_client_that_has_left(model, batcher):
    events, blocks = queue.Queue(), []

    class Endless(AudioStream):
        def __iter__(self):
            while True:
                blocks.append(time.monotonic())
                yield np.full(30 * RATE, 0.01, np.float32)

        @property
        def seconds(self):
            return 1e6

    request = Request([model.user_turn("What?")], [Endless(b"", RATE)], 5, events.put, events.put)
    batcher.submit(request)
    assert isinstance(events.get(timeout=60), Listening)
    request.cancel()
    told = events.get(timeout=60)
    while isinstance(told, Listening):
        told = events.get(timeout=60)
    assert told == "cancelled"
    read = len(blocks)
    after = queue.Queue()
    short = [np.full(RATE, 0.01, np.float32)]
    batcher.submit(Request([model.user_turn("What?")], [short], 2, after.put, after.put))
    while isinstance(told := after.get(timeout=60), Piece):
        pass
    assert told in ("stop", "length") and len(blocks) == read
    idle(batcher)


def test_generate_answers_around_a_broken_minute(model, broken, tmp_path):
    folder = save_directory(model, tmp_path / "model")
    (tmp_path / "broken.flac").write_bytes(broken)
    arguments = ["--json", "--max-new-tokens", "4", "--max-positions", "40", "--positions-per-second", "0.5"]
    told = launch("generate", folder, tmp_path / "broken.flac", "What is it about?", *arguments)
    (record,) = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert isinstance(record["answer"], str) and 360 < record["gaps"][0]["begin_seconds"] < 440
    assert "cannot be read from" in told and "the rest is answered" in told


def test_the_page_tells_how_much_is_heard(model, batcher, broken, tmp_path):
    pytest.importorskip("gradio")
    from nemo_mtbi.serving.page import Page

    (tmp_path / "a.flac").write_bytes(broken)
    page = Page(model, batcher, Limits(max_tokens=8, max_audio_seconds=700), None)
    remarks = [remark for _, remark in page.speech(str(tmp_path / "a.flac"), "What is it about?", 8)]
    assert any(r.endswith("% of 600.0 s heard") for r in remarks[:-1])
    assert remarks[-1].startswith("600.0 s; cannot be read from 3") or remarks[-1].startswith("600.0 s; cannot be read")


def asked(model, audio, told, ended, on_piece=lambda piece: None):
    """A request about an audio, which appends the kinds of its pieces to ``told`` and puts its end into ``ended``."""

    def piece(new):
        told.append(type(new).__name__)
        on_piece(new)

    return Request([model.user_turn("What?")], [audio], 2, piece, ended.put)


def second():
    return [np.full(RATE, 0.01, np.float32)]


def test_short_questions_are_answered_while_long_audio_is_heard(model, batcher, recording):
    told, sent, ended, short_ended = [], [], queue.Queue(), queue.Queue()

    def while_listening(piece):
        if isinstance(piece, Listening) and piece.share < 1 and not sent:
            sent.append(asked(model, second(), [], short_ended))
            batcher.submit(*sent)
        elif isinstance(piece, Piece):
            sent.append(short_ended.empty())

    batcher.submit(asked(model, AudioStream(recording, RATE), told, ended, while_listening))
    assert ended.get(timeout=120) == short_ended.get(timeout=1) == "length"
    assert told[0] == "Listening" and told[-1] == "Piece" and sent[1:] and not any(sent[1:])


def test_several_answers_hear_the_audio_once(model, client, recording, monkeypatch):
    hear, heard = generation.hear, []

    def counted(perception, audios, *others):
        heard.append(len(audios))
        return hear(perception, audios, *others)

    monkeypatch.setattr(generation, "hear", counted)
    answer = ask(client, recording, n=3).json()
    assert heard == [1] and len({c["message"]["content"] for c in answer["choices"]}) == 1
    assert len(answer["choices"]) == 3


def test_the_bytes_of_waiting_requests_are_bounded(model, batcher, monkeypatch):
    monkeypatch.setattr(batcher, "max_waiting_bytes", 100_000)
    ended = queue.Queue()
    requests = [asked(model, second(), [], ended) for _ in range(3)]
    serve = batcher._serve
    release = threading.Event()
    monkeypatch.setattr(batcher, "_serve", lambda batch: (release.wait(60), serve(batch)))
    batcher.submit(requests[0])
    with pytest.raises(QueueFull, match="audio of waiting requests takes 100000 bytes"):
        batcher.submit(*requests[1:])
    release.set()
    assert ended.get(timeout=60) == "length"
    idle(batcher)
    batcher.submit(requests[1])
    assert ended.get(timeout=60) == "length"
    idle(batcher)
