"""Names of pretrained parts as people type them."""

import importlib.util
import socket
from pathlib import Path

import pytest

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.examples.serve import bound
from nemo_mtbi.pretrained import gguf, offline
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained

pytestmark = pytest.mark.unit


def test_a_home_is_expanded(monkeypatch, tmp_path):
    (tmp_path / "llm").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_pretrained("~/llm") == str(tmp_path / "llm")


@pytest.mark.parametrize("name", ["models/qwen/7b", "~/nowhere", "./nowhere", "a b/c", "runs/lr=1"])
def test_what_is_neither_a_path_nor_a_name_of_a_hub(name):
    with pytest.raises(ConfigError, match="There is no model"):
        resolve_pretrained(name)
    fingerprint(name)  # says nothing


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "gpt2"])
def test_names_of_a_hub_stay(name):
    assert resolve_pretrained(name) == name


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv(offline.CACHE_VARIABLE, "/proc/nowhere")
    with pytest.raises(ConfigError, match=r"cannot be written to /proc/nowhere.*NEMO_MTBI_CACHE"):
        resolve_pretrained("offline:smollm2-135m-instruct")


def test_a_user_without_a_home(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(offline.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ConfigError, match="NEMO_MTBI_CACHE"):
        offline.cache_dir()


def test_a_missing_reader_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert importlib.util.find_spec("gguf")
    with pytest.raises(ConfigError, match=r"nemo-mtbi\[demo\]"):
        gguf.convert(tmp_path / "x.gguf", tmp_path, "float32")


def test_an_address_in_use_is_said_before_a_model_is_loaded():
    [own] = bound("127.0.0.1", 0)
    with own:
        own.listen()
        with pytest.raises(ConfigError, match="in use.*Choose another port"):
            bound("127.0.0.1", own.getsockname()[1])
    for port in (-1, 70_000):
        with pytest.raises(ConfigError, match=f"port={port}"):
            bound("127.0.0.1", port)
    assert isinstance(own, socket.socket)
