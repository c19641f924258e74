"""Corpus steps at scale: memory by entries, and what a second process brings.

    python benchmarks/corpus_scale.py [--quick] [--json FILE]

``peak_gb_by_entries``: resident memory of a process that finds N utterances in the journal of ``mtbi prepare`` and
writes manifest and report again (``baseline_gb``: the same process before it). ``cache_peak_gb_by_entries``: the same
of ``mtbi cache`` that finds the features of N utterances. ``two_workers_vs_one``: utterances a
second of ``mtbi prepare describe.enabled=true`` on made recordings of 4 s, two processes over one; ``workers_agree``:
whether both wrote the same bytes; ``ray_equals_local``: whether two workers of a Ray cluster of this machine did
(``pip install nemo-mtbi[ray]``).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
from lhotse.utils import fastcopy
from results_file import finish

from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig
from nemo_mtbi.preparation.sources import SourceConfig, utterance_cut

TEXT, RATE = "the quick brown fox jumps over the lazy dog and runs", 16_000


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)


def finished(entries: int) -> None:
    """Print what it takes to write the manifest of so many finished utterances."""
    folder = Path(tempfile.mkdtemp())
    table = folder / "t.tsv"
    with open(table, "w") as rows:
        rows.write("path\ttranscript\tspeaker\n")
        rows.writelines(f"clips/u{i:08d}.wav\t{TEXT}\ts{i % 500}\n" for i in range(entries))
    soundfile.write(folder / "a.wav", np.zeros(4 * RATE), RATE)
    config = PrepareConfig(str(folder / "out"), [SourceConfig("tsv", path=str(table))], aligner="none")
    step = Preparation(config)
    record: dict[str, Any] = {"settings": step.settings, "text": TEXT, "unaligned": None, "audio": []}
    cut = utterance_cut("u", folder / "a.wav", TEXT, "s", "en").to_dict()
    (folder / "out").mkdir()
    with open(folder / "out" / "prepared.jsonl", "w") as journal:
        for entry in step._entries():
            cut["id"] = cut["supervisions"][0]["id"] = entry.id
            journal.write(json.dumps({"id": entry.id, **record, "of": entry.identity, "cut": cut}) + "\n")
    baseline, begin = peak_gb(), time.time()
    step.run()
    print(json.dumps({"peak_gb": peak_gb(), "baseline_gb": baseline, "seconds": round(time.time() - begin, 1)}))


def cached(entries: int) -> None:
    """Print what it takes to write the manifest of so many utterances whose features are there."""
    from nemo_mtbi.data.feature_cache import features_key
    from nemo_mtbi.io import jsonl
    from nemo_mtbi.preparation.cache_features import cache_features

    folder = Path(tempfile.mkdtemp())
    soundfile.write(folder / "a.wav", np.zeros(4 * RATE), RATE)
    cut = utterance_cut("u", folder / "a.wav", TEXT, "s", "en")
    line = cut.to_dict()
    arrays = folder / "cuts.features.bin"
    shape = {"storage_key": "0,bfloat16,200x384", "shape": [200, 384]}
    array = {"storage_type": "raw_chunky", "storage_path": str(arrays), **shape}
    with open(arrays, "wb") as file:
        file.truncate(2 * 200 * 384)
    with open(folder / "cuts.jsonl", "w") as cuts, open(folder / "cuts.features.jsonl", "w") as journal:
        for i in range(entries):
            line["id"] = f"u{i:08d}"
            line["start"] = i * 1e-9  # so that each has a key of its own
            cuts.write(json.dumps(line) + "\n")
            key = features_key(fastcopy(cut, start=line["start"]), "encoder")
            journal.write(jsonl.dumps({"key": key, "array": array}) + "\n")
    baseline, begin = peak_gb(), time.time()
    encoder: Any = SimpleNamespace(key="encoder", writing_key=None)
    report = cache_features(encoder, folder / "cuts.jsonl")
    assert report.cached == entries and report.encoded == report.skipped == 0
    print(json.dumps({"peak_gb": peak_gb(), "baseline_gb": baseline, "seconds": round(time.time() - begin, 1)}))


def measured(step: str, entries: int) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--{step}", str(entries)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(out.strip().splitlines()[-1]))


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
    for executor, number in (("local", 1), ("local", 2), ("ray", 2)):
        name = str(number) if executor == "local" else executor
        source = SourceConfig("tsv", path=str(folder / "t.tsv"))
        config = PrepareConfig(str(folder / name), [source], aligner="none", executor=executor, workers=number)
        config.describe.enabled = True
        begin = time.time()
        written = Preparation(config).run()
        rates[name] = count / (time.time() - begin)
        bytes_written[name] = {split: path.read_bytes() for split, path in written.items()}
    return {
        "utterances_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "two_workers_vs_one": round(rates["2"] / rates["1"], 3),
        "workers_agree": bytes_written["1"] == bytes_written["2"],
        "ray_equals_local": bytes_written["ray"] == bytes_written["1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 entries, 60 recordings")
    parser.add_argument("--json", type=Path)
    for step in ("finished", "cached"):
        parser.add_argument(f"--{step}", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.finished is not None:
        finished(given.finished)
        return
    if given.cached is not None:
        cached(given.cached)
        return
    sizes = (10_000, 100_000) if given.quick else (10_000, 100_000, 1_000_000)
    result: dict[str, Any] = {
        "peak_gb_by_entries": {str(n): measured("finished", n) for n in sizes},
        "cache_peak_gb_by_entries": {str(n): measured("cached", n) for n in sizes},
        **workers(60 if given.quick else 200),
    }
    finish(result, given.json)


if __name__ == "__main__":
    main()
