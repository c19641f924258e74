"""Minutes and an hour of audio through the endpoint: seconds, memory of the server, and a client that leaves.

    python benchmarks/long_endpoint.py [--model DIR] [--minutes M ...] [--json FILE]

Without ``--model``, a dense connector of 25 positions a second that was never trained, on the offline parts: its
answers are worth nothing, time and memory are those of a trained one. The server is a process of its own for each
length; recordings are the package's LibriSpeech utterances again and again, as MP3.

``by_minutes``: seconds to the whole answer of 8 tokens, the server's peak memory (``peak_gb``) and before the first
request (``idle_gb``). ``after_leaving_seconds``: from the moment at which a client leaves the longest recording, of
which at least a pass was heard, to the answer to a recording of 4 s.
"""

import argparse
import base64
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import soundfile
from results_file import finish, peak_gb

RATE, BUDGET = 16_000, 400


def untrained(folder: Path) -> Path:
    """An export of a speech LLM with a new dense connector."""
    import torch

    from nemo_mtbi.checkpoints.archive import save_directory
    from nemo_mtbi.models.mtbi_salm import MTBISALM

    torch.manual_seed(0)
    connector = {"_target_": "nemo_mtbi.modules.connectors.ConvBottleneckConnector", "layers": 1}
    config = {
        "pretrained_llm": "offline:smollm2-135m-instruct",
        "pretrained_asr": "offline:whisper-tiny.en",
        "prompt_format": "chat_template",
        "perception": {"input_length": "own", "modality_adapter": connector, "fusion": {"max_positions": BUDGET}},
    }
    return Path(save_directory(MTBISALM(config), folder))


def recording_of(seconds: float, path: Path) -> bytes:
    """The package's LibriSpeech utterances as one MP3."""
    import nemo_mtbi
    from nemo_mtbi.data.audio import load_waveform

    folder = Path(nemo_mtbi.__file__).parent / "samples"
    speech = [load_waveform(f, RATE) for f in sorted(folder.rglob("*.mp3"))]
    left = round(seconds * RATE)
    with soundfile.SoundFile(path, "w", RATE, 1, format="MP3") as file:
        while left > 0:
            for samples in speech:
                file.write(samples[:left])
                left -= len(samples[:left])
    return path.read_bytes()


class Server:
    """``mtbi serve`` without its page."""

    def __init__(self, model: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "nemo_mtbi.examples.serve", f"model={model}", f"port={port}", "page=false"]
        self.process = subprocess.Popen([*command, "name=m", f"max_positions={BUDGET}"], stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}/v1/chat/completions"
        begin = time.time()
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models")
                return
            except httpx.HTTPError:
                if self.process.poll() is not None or time.time() - begin > 300:
                    raise
                time.sleep(0.2)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()

    def peak_gb(self) -> float:
        return round(peak_gb(self.process.pid), 3)


def body(audio: bytes, **options: Any) -> dict[str, Any]:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(audio).decode(), "format": "mp3"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this about?"}, part]}]
    return {"model": "m", "messages": messages, "max_tokens": 8, **options}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 10, 60])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"positions": BUDGET, "by_minutes": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or untrained(folder / "model")
        short = recording_of(4, folder / "short.mp3")
        for minutes in given.minutes:
            audio = recording_of(60 * minutes, folder / "long.mp3")
            with Server(model) as server:
                idle, begin = server.peak_gb(), time.time()
                answer = httpx.post(server.url, json=body(audio), timeout=None)
                own = {"status": answer.status_code, "seconds": round(time.time() - begin, 2)}
                own |= {"peak_gb": server.peak_gb(), "idle_gb": idle, "megabytes": round(len(audio) / 1e6, 1)}
                result["by_minutes"][f"{minutes:g}"] = own
                if minutes == max(given.minutes):
                    with httpx.stream("POST", server.url, json=body(audio, stream=True), timeout=None) as events:
                        heard = next((line for line in events.iter_lines() if line.startswith(": ")), ": nothing heard")
                    begin = time.time()
                    answer = httpx.post(server.url, json=body(short), timeout=None)
                    left = {"heard_before": heard[2:], "status": answer.status_code}
                    result["left"] = {**left, "after_leaving_seconds": round(time.time() - begin, 2)}
    finish(result, given.json)


if __name__ == "__main__":
    main()
