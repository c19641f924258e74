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

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status = self.replies.pop(0) if self.replies else 200
        choice = {"text": "fine", "index": 0, "finish_reason": "stop", "logprobs": None}
        body = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        data = json.dumps(body if status == 200 else {"error": {"message": f"status {status}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def misbehaving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def engine(smollm2, url, **changes):
    return OpenAIEngine(
        OpenAIConfig(base_url=url, model="m", max_retries=2, **changes),
        AutoTokenizer(smollm2, use_fast=True).tokenizer,
        smollm2,
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


def test_a_server_that_is_down(smollm2):
    with pytest.raises(DataError, match="Is the server running"):
        list(engine(smollm2, f"http://127.0.0.1:{free_port()}/v1").generate(requests(smollm2)))
