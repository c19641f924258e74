"""The endpoint in a process of its own: OpenAI's client, 32 requests at once, and what must not bring it down."""

import base64
import io
import json
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import openai
import psutil
import pytest
import soundfile

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.models import MTBISALM
from tests.helpers import build, served_config
from tests.launching import Started

pytestmark = pytest.mark.functional
PORT, WAITING = 29561, 24
PROMPTS = ["Repeat this.", "What is it about?", "Say it again.", "Who speaks?"]


def wav(seconds, seed, rate=16000, format="WAV"):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()


def content(audio, prompt, format="wav"):
    data = base64.b64encode(audio).decode()
    return [{"type": "text", "text": prompt}, {"type": "input_audio", "input_audio": {"data": data, "format": format}}]


def audio_url(url):
    """A message as vLLM's clients send audio."""
    return {"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": url}}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llm, tiny_whisper):
    model = build(served_config(tiny_llm, tiny_whisper))
    return save_directory(model, tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return MTBISALM.restore_from(folder)


@contextmanager
def serving(folder, port, ready, *options):
    """``mtbi serve`` in a process of its own, from when ``ready`` (a path) answers. -> process, address."""
    process = Started("serve", [f"model={folder}", f"port={port}", "threads=1", "max_audio_seconds=20", *options])
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(url + ready).status_code == 200:
                break
        except httpx.HTTPError:
            time.sleep(0.2)
        assert process.poll() is None, process.so_far()[-3000:]
    yield process, url
    process.terminate()
    assert process.wait(30) is not None


@pytest.fixture(scope="module")
def server(folder):
    options = [f"max_waiting={WAITING}", "max_body_bytes=3000000", "max_tokens=40", "page=false"]
    with serving(folder, PORT, "/health", *options) as running:
        assert httpx.get(f"{running[1]}/health").json()["status"] == "ok"
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)


def ask(client, audio, prompt, **options):
    messages = [{"role": "user", "content": content(audio, prompt)}]
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 6, **options})


def expected(model, audio, prompt, tokens=6):
    samples, _ = soundfile.read(io.BytesIO(audio), dtype="float32")
    return model.chat(samples, prompt, max_new_tokens=tokens, do_sample=False)


def test_openais_client_gets_the_models_answer_whole_and_in_pieces(client, model):
    assert [m.id for m in client.models.list()] == ["tiny"]
    audio = wav(1.3, 0)
    answer = ask(client, audio, PROMPTS[0])
    assert answer.choices[0].message.content == expected(model, audio, PROMPTS[0])
    assert answer.usage.completion_tokens <= 6 and answer.usage.prompt_tokens > 6
    pieces = [c.choices[0].delta.content or "" for c in ask(client, audio, PROMPTS[0], stream=True)]
    assert "".join(pieces).strip() == answer.choices[0].message.content and len(pieces) > 2
    for other in (wav(1.3, 0, 44_100, "FLAC"), wav(1.3, 0, 15_991), wav(1.3, 0, 4_000)):
        assert ask(client, other, PROMPTS[1]).choices[0].finish_reason in ("stop", "length")


def test_turns_with_several_audios_follow_the_dialog(client, model):
    from nemo_mtbi.models.conversation import Conversation

    first, second = wav(1.0, 1), wav(1.5, 2)
    messages = [{"role": "user", "content": content(first, PROMPTS[0])}]
    one = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5).choices[0].message.content
    messages += [{"role": "assistant", "content": one}, {"role": "user", "content": content(second, PROMPTS[1])}]
    two = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5).choices[0].message.content
    talk = Conversation(model)
    samples = [soundfile.read(io.BytesIO(a), dtype="float32")[0] for a in (first, second)]
    assert talk.ask(PROMPTS[0], samples[0], max_new_tokens=5, do_sample=False) == one
    assert talk.ask(PROMPTS[1], samples[1], max_new_tokens=5, do_sample=False) == two
    assert len(talk.audios) == 2 and [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_thirty_two_at_once_get_their_own_answers_or_429(server, client, model):
    process, _ = server
    audios = [wav(0.8 + 0.1 * (i % 5), i) for i in range(32)]
    resident = psutil.Process(process.pid).memory_info().rss

    def one(index):
        for attempt in range(200):
            try:
                answer = ask(client, audios[index], PROMPTS[index % 4], max_tokens=4 + index % 3)
                return answer.choices[0].message.content, attempt
            except openai.RateLimitError as error:
                assert error.response.headers["retry-after"] == "1"
                time.sleep(0.05)
        raise AssertionError("never answered")

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(32)))
    for index, (text, _) in enumerate(answers):
        assert text == expected(model, audios[index], PROMPTS[index % 4], 4 + index % 3), index
    assert psutil.Process(process.pid).memory_info().rss < resident + 500 * 2**20


def test_a_full_queue_is_429(server, client):
    """More requests at once than one batch and the queue hold: some are refused, none is lost."""
    audio, codes = wav(0.5, 0), []

    def one(_):
        try:
            ask(client, audio, PROMPTS[0], max_tokens=40)
            codes.append(200)
        except openai.RateLimitError as error:
            codes.append(429)
            assert error.response.headers["Retry-After"] == "1"

    with ThreadPoolExecutor(80) as pool:
        list(pool.map(one, range(80)))
    assert len(codes) == 80 and codes.count(429) > 0 and codes.count(200) >= WAITING


def quiet_hours():
    """An hour of silence as FLAC: some kilobytes that decode to hundreds of megabytes."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(3600 * 16000, dtype=np.int16), 16000, format="FLAC")
    return file.getvalue()


@pytest.mark.parametrize(
    "body, kind, status, message",
    [
        (b"{not json", "application/json", 400, "JSON"),
        (b"{}", "application/json", 400, "messages"),
        (b"[]", "application/json", 400, "body"),
        (b"\xff\xfe\x00", "application/json", 400, ""),
        (b"a=b", "application/x-www-form-urlencoded", 415, "application/json"),
        (b'{"messages": []}', "text/plain", 415, "application/json"),
        (b"{", "application/json", 400, "no JSON: Expecting property name"),
        (b"x" * 4_000_000, "application/json", 413, "3000000"),
        (b"[" * 200_000, "application/json", 400, ""),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
            "application/json",
            400,
            "temperature",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}', "application/json", 400, "unicode"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400, "does not fit"),
        (b'{"messages": [{"role": "user", "content": "a"}], "model": "\\ud800"}', "application/json", 404, "ud800"),
    ],
)
def test_malformed_bodies_are_refused(server, body, kind, status, message):
    answer = httpx.post(f"{server[1]}/v1/chat/completions", content=body, headers={"content-type": kind}, timeout=60)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_a_body_of_unannounced_length_is_cut_off(server):
    chunks = (b" " * 65536 for _ in range(100))
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server[1]}/v1/chat/completions", content=chunks, headers=headers, timeout=60)
    assert answer.status_code == 413 and "3000000" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "audio, message",
    [
        (b"no audio", "cannot be decoded"),
        (b"", "cannot be decoded"),
        (wav(0.01, 0), "at least 0.05 s"),
        (wav(1.0, 0, 3_999), "sampling rate is 3,999 Hz"),
        (wav(1.0, 0)[:30], "cannot be decoded"),
        (quiet_hours(), "longer than 20 s"),
        (b"PK\x03\x04" + bytes(1000), "cannot be decoded"),
    ],
)
def test_bad_audio_is_refused(server, client, audio, message):
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        ask(client, audio, PROMPTS[0])
    assert refused.value.param == "messages" and "BytesIO" not in refused.value.message
    assert refused.value.status_code == (413 if "longer" in message else 400)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n:"),
        ({"n": 9}, openai.BadRequestError, "n: 9 answers; at most 8"),
        ({"model": "other"}, openai.NotFoundError, "no model 'other'"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "function", "content": "a"}]}, openai.BadRequestError, "role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, openai.BadRequestError, "last message"),
        ({"messages": [audio_url("https://example.org/a.wav")]}, openai.BadRequestError, "fetches none"),
        ({"messages": [audio_url("file:///etc/passwd")]}, openai.BadRequestError, "fetches none"),
        ({"messages": [audio_url("data:audio/wav,abc")]}, openai.BadRequestError, "without base64"),
        ({"messages": [{"role": "user", "content": content(b"", "a") * 17}]}, openai.BadRequestError, "16 audios"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, openai.BadRequestError, "context has"),
        ({"top_logprobs": 3}, openai.BadRequestError, "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream=true"),
        ({"stop": ""}, openai.BadRequestError, "1 to 256 characters"),
        ({"stop": ["a"] * 17}, openai.BadRequestError, "up to 16 texts"),
        ({"seed": 2**63}, openai.BadRequestError, "seed"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty: is not supported.*except 0"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools: is not"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format: is not"),
        ({"extra_body": {"no_such_field": 1}}, openai.BadRequestError, "no_such_field: is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, "image_url"),
        (
            {"messages": [{"role": "assistant", "content": content(wav(1, 0), "a")}]},
            openai.BadRequestError,
            "Only a user",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}],
                    }
                ]
            },
            openai.BadRequestError,
            "base64",
        ),
    ],
)
def test_bad_requests_say_what_is_wrong(client, change, error, message):
    request = {"model": "tiny", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 3, **change}
    with pytest.raises(error, match=message):
        client.chat.completions.create(**request)


def test_a_client_that_leaves_does_not_hold_the_queue(server, client):
    audio = wav(1.0, 3)
    body = {"messages": [{"role": "user", "content": content(audio, PROMPTS[0])}], "stream": True, "max_tokens": 40}
    for _ in range(4):
        with httpx.stream("POST", f"{server[1]}/v1/chat/completions", json=body, timeout=60) as answer:
            assert json.loads(next(answer.iter_lines()).removeprefix("data: "))["object"] == "chat.completion.chunk"
    assert ask(client, audio, PROMPTS[0]).choices[0].finish_reason in ("stop", "length")


def test_streaming_in_python_equals_the_whole_answer(model, tmp_path):
    file = tmp_path / "a.wav"
    file.write_bytes(wav(1.2, 5))
    whole = model.chat(file, PROMPTS[1], max_new_tokens=8, do_sample=False)
    assert "".join(model.stream(file, PROMPTS[1], max_new_tokens=8, do_sample=False)).strip() == whole
    passes = []
    hook = model.llm.register_forward_hook(lambda *_: passes.append(1))
    pieces = model.stream(file, PROMPTS[1], max_new_tokens=500, min_new_tokens=500, do_sample=False)
    next(pieces)
    pieces.close()  # stops the generation
    hook.remove()
    assert len(passes) < 400
    assert not [t for t in threading.enumerate() if t.name.startswith("Thread-") and "work" in t.name]
    with pytest.raises(ValueError, match="no audio file"):
        next(model.stream(tmp_path / "absent.wav", "?"))


def test_a_request_cancelled_in_the_queue_is_ended(model):
    from nemo_mtbi.serving.batching import Batcher
    from nemo_mtbi.serving.request import Request

    ends = queue.Queue()
    request = Request([{"role": "user", "content": "Hello."}], [], 3, lambda text: ends.put(text), ends.put)
    request.cancel()
    Batcher(model).submit(request)
    assert ends.get(timeout=30) == "cancelled" and request.tokens == []


def question(text, max_tokens=3, **options):
    """A request, and a list that gets its pieces and its end."""
    from nemo_mtbi.serving.request import Request

    told, ended = [], threading.Event()

    def end(reason):
        told.append(reason)
        ended.set()

    dialog = [{"role": "user", "content": [text]}]
    return Request(dialog, [], max_tokens, told.append, end, **options), told, ended


def answer_together(batcher, *questions):
    """In one batch: they come while the batcher's thread is busy."""
    busy, free = threading.Event(), threading.Event()
    first, _, first_ended = question("First.", 1)
    first.on_piece = lambda _: (busy.set(), free.wait(60))
    batcher.submit(first)
    assert busy.wait(60)
    batcher.submit(*[request for request, _, _ in questions])
    free.set()
    assert all(ended.wait(60) for _, _, ended in questions) and first_ended.wait(60)


def test_what_one_request_breaks_the_others_survive(model, monkeypatch):
    """A prompt that fails, a prompt over the context, and a listener that fails, in one batch with a good request."""
    from nemo_mtbi.serving.batching import Batcher

    alone, told_alone, ended_alone = question("Hello.")
    batcher = Batcher(model)
    batcher.submit(alone)
    assert ended_alone.wait(60)
    render = model.prompt_pieces

    def failing(dialogs):
        if any("breaks" in m["content"][0] for dialog in dialogs for m in dialog):
            raise RuntimeError("out of memory")
        return render(dialogs)

    def listener(_):
        raise OSError("gone")

    monkeypatch.setattr(model, "prompt_pieces", failing)
    monkeypatch.setattr(model.llm.config, "max_position_embeddings", 100)
    good, bad, long, deaf, last = [question(t) for t in ("Hello.", "breaks", "word " * 200, "Hello.", "a " * 50)]
    last[0].max_tokens = 90
    deaf[0].on_piece = listener
    answer_together(batcher, good, bad, long, deaf, last)
    assert [p for p in good[1]] == told_alone
    assert isinstance(bad[1][-1], RuntimeError) and "context has 100" in str(long[1][-1]) and deaf[1] == ["cancelled"]
    assert last[1][-1] == "length" and len(last[0].tokens) == 100 - last[0].prompt_positions > 0


def test_a_short_answer_does_not_wait_for_a_long_one(model):
    """Both in one batch: the short one has ended before the long one goes on."""
    from nemo_mtbi.serving.batching import Batcher

    short, long = question("Hello.", 2), question("Hello.", 12)
    ended = []
    long[0].on_piece = lambda _: ended.append((len(long[0].tokens), short[2].is_set()))
    answer_together(Batcher(model), long, short)
    assert short[1][-1] == long[1][-1] == "length" and len(ended) > 3
    assert all(is_set == (tokens > 2) for tokens, is_set in ended)
