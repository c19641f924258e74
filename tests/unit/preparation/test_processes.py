"""Corpus steps in several processes."""

import os
import time

import numpy as np
import pytest
import soundfile

from nemo_mtbi.errors import ConfigError, MTBIError
from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig
from nemo_mtbi.preparation.processes import CHUNK, CHUNKS_AHEAD, in_processes
from nemo_mtbi.preparation.sources import SourceConfig

pytestmark = pytest.mark.unit


def test_results_come_in_order_from_other_processes():
    def slowly(i):
        time.sleep(0.01)
        return i, os.getpid()

    found = list(in_processes(slowly, range(100), 2))
    assert [i for i, _ in found] == list(range(100))
    assert len({pid for _, pid in found} - {os.getpid()}) == 2
    assert {pid for _, pid in in_processes(lambda i: (i, os.getpid()), range(100), 1)} == {os.getpid()}


def test_few_items_are_under_way(tmp_path):
    def touched(i):
        (tmp_path / str(i)).touch()
        return i

    results = in_processes(touched, range(1000), 2)
    next(results)
    results.close()
    assert 0 < len(list(tmp_path.iterdir())) <= CHUNK * (2 * CHUNKS_AHEAD + 2)


def test_what_fails_and_what_dies():
    def fails(i):
        if i == 20:
            raise ValueError("twenty")
        return i

    results, got = in_processes(fails, range(100), 2), []
    with pytest.raises(ValueError, match="twenty"):
        got.extend(iter(lambda: next(results), None))
    assert got == list(range(16))

    def dies(i):
        if i == 20:
            os._exit(9)
        return i

    with pytest.raises(MTBIError, match="A worker process has died"):
        list(in_processes(dies, range(100), 2))


def test_prepare_gives_the_same_with_several_workers(tmp_path):
    rows = "path\ttranscript\n"
    for i in range(20):
        tone = 0.3 * np.sin(2 * np.pi * (150 + 5 * i) * np.arange(16_000) / 16_000)
        soundfile.write(tmp_path / f"{i}.wav", tone, 16_000)
        rows += f"{i}.wav\thello there\n"
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    (tmp_path / "t.tsv").write_text(rows + "broken.wav\thello\n")
    written = {}
    for workers in (1, 2):
        source = SourceConfig("tsv", path=str(tmp_path / "t.tsv"))
        config = PrepareConfig(str(tmp_path / str(workers)), [source], aligner="none", workers=workers)
        config.split.shares, config.describe.enabled = {"train": 1.0}, True
        Preparation(config).run()
        written[workers] = [
            (tmp_path / str(workers) / name).read_bytes() for name in ("cuts.train.jsonl", "prepared.jsonl")
        ]
    assert written[1] == written[2] and b"unreadable audio" in written[1][1]
    config.workers = 0
    with pytest.raises(ConfigError, match="workers=0"):
        Preparation(config)
