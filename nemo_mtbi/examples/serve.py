"""A web page and an OpenAI-compatible endpoint for an exported speech LLM. See conf/serve.yaml."""

import socket
from pathlib import Path

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.examples._launcher import launcher

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@launcher("serve")
def main(cfg: DictConfig) -> None:
    from importlib.util import find_spec

    from nemo_mtbi.errors import ConfigError

    needed = ("fastapi", "uvicorn", "python_multipart", *(["gradio"] if cfg.page else []))
    missing = [n for n in needed if find_spec(n) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed: pip install 'nemo_mtbi[serve]', or set page=false.")
    listening = bound(cfg.host, cfg.port)
    from nemo_mtbi.process import expect_any_length, tune

    expect_any_length()  # before the libraries below have threads
    import uvicorn

    from nemo_mtbi.models.exported import open_speech_llm
    from nemo_mtbi.parallel.launch import chosen_device
    from nemo_mtbi.serving.batching import Batcher
    from nemo_mtbi.serving.limits import Limits
    from nemo_mtbi.serving.openai_api import create_app

    tune(cfg.threads)
    device = chosen_device(str(cfg.device), 1, "serve")
    model = open_speech_llm(cfg.model).to(device)
    model.listen_as(cfg.max_positions, cfg.positions_per_second, cfg.time_marks)
    name = cfg.name or Path(cfg.model).stem
    batcher = Batcher(model, cfg.max_batch, cfg.max_waiting, cfg.max_waiting_bytes)
    limits = Limits(
        max_tokens=cfg.max_tokens, max_audio_seconds=cfg.max_audio_seconds, max_body_bytes=cfg.max_body_bytes
    )
    app = create_app(model, name, batcher, limits)
    url = f"http://{cfg.host}:{listening.getsockname()[1]}"
    if cfg.page:
        from nemo_mtbi.serving.page import EXAMPLES, mount_page

        examples = EXAMPLES if cfg.examples is None else list(cfg.examples)
        app = mount_page(app, model, batcher, limits, cfg.asr, examples)
        console.say(f"Page: {url}")
    console.say(f"Endpoint: {url}/v1/chat/completions (model {name!r})")
    if cfg.host not in LOOPBACK:
        console.say("Everybody who reaches this address can use it: there is no login.")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """A socket of that address that does not listen yet.

    Raises:
        ConfigError: the address is in use, or not of this machine.
    """
    from nemo_mtbi.errors import ConfigError

    if not 0 <= port < 2**16:
        raise ConfigError(f"port={port}: from 0 (a free one) to {2**16 - 1}.")
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        own = socket.socket(family, kind, protocol)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except OSError as error:
        raise ConfigError(f"host={host} port={port}: {error}. Choose another port, or 0 for a free one.") from error
    return own


if __name__ == "__main__":
    main()
