"""A web page and an OpenAI-compatible endpoint for an exported speech LLM. See conf/serve.yaml."""

import errno
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.examples._launcher import launcher

ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@launcher("serve")
def main(cfg: DictConfig) -> None:
    from importlib.util import find_spec

    from nemo_mtbi.errors import ConfigError

    needed = ("fastapi", "uvicorn", "python_multipart", *(["gradio"] if cfg.page else []))
    missing = [n for n in needed if find_spec(n) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed: pip install 'nemo_mtbi[serve]', or set page=false.")
    if type(cfg.max_batch) is not int or cfg.max_batch < 1:
        raise ConfigError(f"max_batch={cfg.max_batch}: give a whole number of at least 1.")
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
    model = open_speech_llm(cfg.model, trust_remote_code=cfg.trust_remote_code).to(device)
    model.listen_as(cfg.max_positions, cfg.positions_per_second, cfg.time_marks)
    name = str(cfg.name or "") or Path(os.path.abspath(cfg.model)).name.removesuffix(".nemo")
    batcher = Batcher(model, cfg.max_batch, cfg.max_waiting, cfg.max_waiting_bytes)
    limits = Limits(
        max_tokens=cfg.max_tokens, max_audio_seconds=cfg.max_audio_seconds, max_body_bytes=cfg.max_body_bytes
    )
    app = create_app(model, name, batcher, limits)
    url = f"http://{cfg.host}:{listening[0].getsockname()[1]}"
    if cfg.page:
        from nemo_mtbi.serving.page import EXAMPLES, mount_page

        examples = EXAMPLES if cfg.examples is None else list(cfg.examples)
        app = mount_page(app, model, batcher, limits, cfg.asr, examples)
        console.say(f"Page: {url}")
    console.say(f"Endpoint: {url}/v1/chat/completions (model {name!r})")
    if cfg.host not in LOOPBACK:
        console.say("Everybody who reaches this address can use it: there is no login.")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with suppress(KeyboardInterrupt):
        server.run(sockets=listening)
    if not server.started:
        sys.exit(3)


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets of all addresses of a host, which do not listen yet.

    Raises:
        ConfigError: an address is in use, or not of this machine.
    """
    from nemo_mtbi.errors import ConfigError

    if not 0 <= port < 2**16:
        raise ConfigError(f"port={port}: from 0 (a free one) to {2**16 - 1}.")
    found: list[socket.socket] = []
    problem: OSError | None = None
    try:
        addresses = dict.fromkeys(
            (family, address) for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        for family, address in addresses:
            try:
                own = socket.socket(family, socket.SOCK_STREAM)
                own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                own.bind((address[0], found[0].getsockname()[1] if found else port, *address[2:]))
                found.append(own)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                problem = error  # a name may have an address of a family that this machine does not speak
        if problem is not None and not found:
            raise problem
    except OSError as error:
        for own in found:
            own.close()
        raise ConfigError(f"host={host} port={port}: {error}. Choose another port, or 0 for a free one.") from error
    return found


if __name__ == "__main__":
    main()
