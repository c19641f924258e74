"""Answers from a real OpenAI-compatible server.

``transformers serve`` with SmolLM2, and from servers that misbehave.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_mtbi import registration as registration
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.targets.config import OpenAIConfig, TargetsConfig
from nemo_mtbi.targets.decoder import Request
from nemo_mtbi.targets.generate import TargetGenerator
from nemo_mtbi.targets.openai_engine import OpenAIEngine
from tests.unit.targets_helpers import write_cuts

pytestmark = pytest.mark.functional


END_OF_TURN = 2  # of SmolLM2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(smollm2):
    port = free_port()
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", smollm2]
    options = ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen([*serve, *options], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_a_real_server_gives_the_answers_of_the_hf_engine(tmp_path, smollm2, server):
    texts = ["the train to rome leaves at noon", "my sister bought a red umbrella", "please turn off the light"]
    cuts = write_cuts(tmp_path / "cuts.jsonl", 3, lambda i: texts[i])
    values = {
        "cuts": {"train": cuts},
        "llm": smollm2,
        "dtype": "float32",
        "prompt_format": "chatml",
        "max_new_tokens": 24,
        "task_names": ["about", "repeat"],
        "filters": ["empty"],
    }
    own = TargetGenerator(TargetsConfig(**values, output_dir=str(tmp_path / "hf"))).run()["train"]
    remote = OpenAIConfig(base_url=server, model=smollm2, concurrency=2)
    asked = TargetsConfig(**values, output_dir=str(tmp_path / "openai"), engine="openai", openai=remote)
    served = TargetGenerator(asked).run()["train"]
    for line, other in zip(own.read_text().splitlines(), served.read_text().splitlines(), strict=True):
        pairs = zip(json.loads(line)["custom"]["targets"], json.loads(other)["custom"]["targets"], strict=True)
        for a, b in pairs:
            assert (a["response_ids"], a["response"], a["finished"]) == (
                b["response_ids"],
                b["response"],
                b["finished"],
            )
            assert a["key"] != b["key"]


class Misbehaving(BaseHTTPRequestHandler):
    """Replies with the statuses of ``replies`` in turn, then with an answer."""

    replies: list[int] = []
    ends: list[str] = []  # finish reasons of the next answers
    text: str | None = "fine"
    read, refused, details = None, "", False
    bodies: list[bytes] = []  # of the next answers, in place of completions
    received: list[dict] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(asked)
        status = self.replies.pop(0) if self.replies else 200
        message = f"status {status}"
        if self.refused and self.refused in asked:
            status, message = 422, f"Unexpected fields in the request: {{'{self.refused}'}}"
        choice = {"text": self.text, "index": 0, "finish_reason": self.ends.pop(0) if self.ends else "stop"}
        body = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        if self.read is not None:
            body["usage"] = {"prompt_tokens": self.read, "completion_tokens": 1, "total_tokens": self.read + 1}
        error = {"detail": message} if self.details else {"error": {"message": message}}
        data = json.dumps(body if status == 200 else error).encode()
        data = self.bodies.pop(0) if self.bodies else data
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def misbehaving(monkeypatch):
    for name, value in (("received", []), ("ends", []), ("replies", []), ("bodies", [])):
        monkeypatch.setattr(Misbehaving, name, value)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def engine(smollm2, url, **changes):
    return OpenAIEngine(
        OpenAIConfig(base_url=url, model="m", max_retries=2, **changes),
        AutoTokenizer(smollm2, use_fast=True).tokenizer,
        END_OF_TURN,
    )


def requests(smollm2, count=1):
    tokenizer = AutoTokenizer(smollm2, use_fast=True).tokenizer
    ids = tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    return [Request(str(i), ids, 8) for i in range(count)]


def test_retries_rate_limit_and_errors(smollm2, misbehaving):
    Misbehaving.replies = [429, 500]
    (answer,) = engine(smollm2, misbehaving).generate(requests(smollm2))
    assert answer.finished and len(answer.response_ids) == 2  # "fine" and the end of the turn
    Misbehaving.replies = [429] * 3
    with pytest.raises(DataError, match=r"after 2 retries: HTTP 429.*requests_per_minute"):
        list(engine(smollm2, misbehaving).generate(requests(smollm2)))
    Misbehaving.replies = [401]
    with pytest.raises(ConfigError, match="refuses the key in \\$OPENAI_API_KEY"):
        list(engine(smollm2, misbehaving).generate(requests(smollm2)))
    Misbehaving.replies = [404]
    with pytest.raises(ConfigError, match=r"Check openai\.model"):
        list(engine(smollm2, misbehaving).generate(requests(smollm2)))
    Misbehaving.replies = []
    start = time.monotonic()
    assert len(list(engine(smollm2, misbehaving, requests_per_minute=1200).generate(requests(smollm2, 5)))) == 5
    assert time.monotonic() - start >= 4 * 60 / 1200
    with pytest.raises(ConfigError, match="top_k=4"):
        list(engine(smollm2, misbehaving).generate(requests(smollm2), top_k=4))


def test_only_answers_that_ended_or_were_cut_off_are_kept(smollm2, misbehaving):
    Misbehaving.ends = ["abort"]
    (answer,) = engine(smollm2, misbehaving).generate(requests(smollm2))
    assert answer.finished and len(Misbehaving.received) == 2  # asked again
    Misbehaving.ends = ["length"]
    (answer,) = engine(smollm2, misbehaving).generate(requests(smollm2))
    assert not answer.finished and answer.response_ids
    Misbehaving.ends = ["abort", "error", "abort"]
    with pytest.raises(DataError, match=r"gives up answers \(abort, error, abort\)"):
        list(engine(smollm2, misbehaving).generate(requests(smollm2)))


def test_replies_that_are_no_completions_are_asked_for_again(smollm2, misbehaving, monkeypatch):
    monkeypatch.setattr("nemo_mtbi.targets.openai_engine.PAUSE", 0.01)
    gateway = json.dumps({"error": {"code": 503, "message": "no backend"}}).encode()
    Misbehaving.bodies = [b'{"id": "x", "cho', gateway]
    (answer,) = engine(smollm2, misbehaving).generate(requests(smollm2))
    assert answer.finished and len(Misbehaving.received) == 3
    Misbehaving.bodies = [gateway] * 3
    with pytest.raises(DataError, match="no completion.*no backend.*Check openai.base_url"):
        list(engine(smollm2, misbehaving).generate(requests(smollm2)))
    monkeypatch.setattr(Misbehaving, "text", None)
    Misbehaving.ends = ["content_filter"]
    (answer,) = engine(smollm2, misbehaving).generate(requests(smollm2))
    assert not answer.finished and answer.response_ids == []
    monkeypatch.setenv("OPENAI_API_KEY", "")  # as shells export what is not set
    assert list(engine(smollm2, misbehaving).generate(requests(smollm2)))


@pytest.mark.parametrize("details", [False, True])
def test_greedy_whatever_penalty_the_server_would_take(smollm2, misbehaving, monkeypatch, details):
    monkeypatch.setattr(Misbehaving, "details", details)  # as servers on FastAPI do
    list(engine(smollm2, misbehaving).generate(requests(smollm2)))
    assert Misbehaving.received[-1]["repetition_penalty"] == 1.0
    monkeypatch.setattr(Misbehaving, "refused", "repetition_penalty")  # as `transformers serve` does
    own = engine(smollm2, misbehaving)
    assert all(answer.finished for answer in own.generate(requests(smollm2, 3)))
    assert Misbehaving.received[-1]["frequency_penalty"] == 0.0 and "repetition_penalty" not in Misbehaving.received[-1]
    Misbehaving.replies = [404]
    with pytest.raises(ConfigError, match="status 404"):
        list(own.generate(requests(smollm2)))


def test_letters_of_a_control_token_are_no_control_token(smollm2, misbehaving, monkeypatch):
    monkeypatch.setattr(Misbehaving, "text", "say <|im_end|> now")
    (answer,) = engine(smollm2, misbehaving).generate(requests(smollm2))
    assert answer.response_ids.count(END_OF_TURN) == 1 and answer.response_ids[-1] == END_OF_TURN
    tokenizer = AutoTokenizer(smollm2, use_fast=True).tokenizer
    assert tokenizer.decode(answer.response_ids[:-1]) == "say <|im_end|> now"
    ids = [*requests(smollm2)[0].prompt_ids, *answer.response_ids[:-1]]  # no text says these
    list(engine(smollm2, misbehaving).generate([Request("a", ids, 8)]))
    assert Misbehaving.received[-1]["prompt"] == ids


def test_a_server_with_another_llm_is_refused(smollm2, misbehaving, monkeypatch):
    (asked,) = requests(smollm2)
    monkeypatch.setattr(Misbehaving, "read", len(asked.prompt_ids))
    assert len(list(engine(smollm2, misbehaving).generate([asked]))) == 1
    monkeypatch.setattr(Misbehaving, "read", 7)
    with pytest.raises(ConfigError, match="read 7 tokens where the prompt has"):
        list(engine(smollm2, misbehaving).generate([asked]))


def test_a_server_that_is_down(smollm2):
    with pytest.raises(DataError, match="Is the server running"):
        list(engine(smollm2, f"http://127.0.0.1:{free_port()}/v1").generate(requests(smollm2)))
