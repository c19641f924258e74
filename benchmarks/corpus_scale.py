"""Corpus steps at scale: memory by entries, and what a second process brings.

    python benchmarks/corpus_scale.py [--quick] [--json FILE]

``peak_gb_by_entries``: resident memory of a process that finds N utterances in the journal of ``mtbi prepare`` and
writes manifest and report again (``baseline_gb``: the same process before it). ``two_workers_vs_one``: utterances a
second of ``mtbi prepare describe.enabled=true`` on made recordings of 4 s, two processes over one; ``workers_agree``:
whether both wrote the same bytes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from results_file import finish

from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig
from nemo_mtbi.preparation.sources import Entry, SourceConfig, utterance_cut

TEXT, RATE = "the quick brown fox jumps over the lazy dog and runs", 16_000


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)


def finished(entries: int) -> None:
    """Print what it takes to write the manifest of so many finished utterances."""
    folder = Path(tempfile.mkdtemp())
    table = folder / "t.tsv"
    table.write_text("path\ttranscript\n")
    soundfile.write(folder / "a.wav", np.zeros(4 * RATE), RATE)
    config = PrepareConfig(str(folder / "out"), [SourceConfig("tsv", path=str(table))], aligner="none")
    step = Preparation(config)
    step._entries = lambda: (Entry(f"u{i:08d}", load, f"s{i % 500}", TEXT) for i in range(entries))  # type: ignore[method-assign]
    record: dict[str, Any] = {"settings": step.settings, "text": TEXT, "unaligned": None, "audio": []}
    (folder / "out").mkdir()
    with open(folder / "out" / "prepared.jsonl", "w") as journal:
        for i in range(entries):
            name = f"u{i:08d}"
            if i == 0:
                cut = utterance_cut(name, folder / "a.wav", TEXT, "s", "en").to_dict()
            cut["id"] = cut["supervisions"][0]["id"] = name
            journal.write(json.dumps({"id": name, **record, "cut": cut}) + "\n")
    baseline, begin = peak_gb(), time.time()
    step.run()
    print(json.dumps({"peak_gb": peak_gb(), "baseline_gb": baseline, "seconds": round(time.time() - begin, 1)}))


def load() -> Any:
    raise AssertionError("finished utterances are not loaded")


def workers(count: int) -> dict[str, Any]:
    """Rates of one and two processes on ``count`` recordings."""
    folder, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    lines = ["path\ttranscript"]
    time_axis = np.arange(4 * RATE) / RATE
    for i in range(count):
        tone = sum(np.sin(2 * np.pi * (100 + i % 80) * k * time_axis) / k for k in range(1, 8))
        soundfile.write(folder / f"{i}.wav", 0.1 * tone + 0.01 * rng.standard_normal(4 * RATE), RATE)
        lines.append(f"{i}.wav\t{TEXT}")
    (folder / "t.tsv").write_text("\n".join(lines) + "\n")
    rates, bytes_written = {}, {}
    for number in (1, 2):
        source = SourceConfig("tsv", path=str(folder / "t.tsv"))
        config = PrepareConfig(str(folder / str(number)), [source], aligner="none", workers=number)
        config.describe.enabled = True
        begin = time.time()
        written = Preparation(config).run()
        rates[number] = count / (time.time() - begin)
        bytes_written[number] = {name: path.read_bytes() for name, path in written.items()}
    return {
        "utterances_per_second": {str(n): round(rate, 2) for n, rate in rates.items()},
        "two_workers_vs_one": round(rates[2] / rates[1], 3),
        "workers_agree": bytes_written[1] == bytes_written[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 entries, 60 recordings")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--finished", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.finished is not None:
        finished(given.finished)
        return
    by_entries = {}
    for entries in (10_000, 100_000) if given.quick else (10_000, 100_000, 1_000_000):
        command = [sys.executable, __file__, "--finished", str(entries)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        by_entries[str(entries)] = json.loads(out.strip().splitlines()[-1])
    result: dict[str, Any] = {"peak_gb_by_entries": by_entries, **workers(60 if given.quick else 200)}
    finish(result, given.json)


if __name__ == "__main__":
    main()
