"""Corpus steps in several processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_mtbi.corpus.processes import CHUNKS_AHEAD, in_processes
from nemo_mtbi.errors import ConfigError, MTBIError
from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig
from nemo_mtbi.preparation.sources import SourceConfig
from tests.unit.corpus_helpers import numbered

pytestmark = pytest.mark.unit
CHUNK = 8


def always(function):
    return lambda worker: function


def test_results_come_in_order_from_other_processes():
    def slowly(i):
        time.sleep(0.01)
        return i, os.getpid()

    found = list(in_processes(always(slowly), range(100), 2))
    assert [i for i, _ in found] == list(range(100))
    assert len({pid for _, pid in found} - {os.getpid()}) == 2
    assert {pid for _, pid in in_processes(always(lambda i: (i, os.getpid())), range(100), 1)} == {os.getpid()}


def test_few_items_are_under_way(tmp_path):
    def touched(i):
        (tmp_path / str(i)).touch()
        return i

    results = in_processes(always(touched), range(1000), 2, CHUNK)
    next(results)
    results.close()
    assert 0 < len(list(tmp_path.iterdir())) <= CHUNK * (2 * CHUNKS_AHEAD + 2)


def test_what_fails_and_what_dies():
    def fails(i):
        if i == 20:
            raise ValueError("twenty")
        return i

    results, got = in_processes(always(fails), range(100), 2, CHUNK), []
    with pytest.raises(ValueError, match="twenty"):
        got.extend(iter(lambda: next(results), None))
    assert got == list(range(16))

    def dies(i):
        if i == 20:
            os._exit(9)
        return i

    with pytest.raises(MTBIError, match="A worker process has died"):
        list(in_processes(always(dies), range(100), 2))


def test_workers_are_made_once_each_with_numbers_of_their_own(tmp_path):
    def make(worker):
        (tmp_path / str(worker)).touch()
        return lambda i: (worker, time.sleep(0.01))[0]

    assert set(in_processes(make, range(60), 3, 2)) == {0, 1, 2}
    assert {f.name for f in tmp_path.iterdir()} == {"0", "1", "2"}

    assert set(in_processes(partial(numbered, str(tmp_path)), range(9), 2, 1, fresh=True)) <= {0, 1}

    def broken(worker):
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):  # as it is, not as a dead process
        list(in_processes(broken, range(60), 2))


def test_who_stops_reading_does_not_wait_for_what_is_under_way():
    begin = time.time()
    results = in_processes(always(lambda i: time.sleep(100 * (i > 0))), range(20), 2, 1)
    next(results)
    results.close()
    assert time.time() - begin < 20


def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import os, pathlib, time\n"
        "from nemo_mtbi.corpus.processes import in_processes\n"
        "def make(worker):\n"
        f"    pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
        "    return lambda i: time.sleep(60)\n"
        "list(in_processes(make, range(60), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.wait()
    until(lambda: not any(Path("/proc", child.name).exists() for child in tmp_path.iterdir()))


def until(true, seconds=30.0):
    end = time.time() + seconds
    while not true():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_prepare_gives_the_same_with_several_workers(tmp_path):
    rows = "path\ttranscript\n"
    for i in range(10):
        tone = 0.3 * np.sin(2 * np.pi * (150 + 5 * i) * np.arange(8_000) / 16_000)
        soundfile.write(tmp_path / f"{i}.wav", tone, 16_000)
        rows += f"{i}.wav\thello there\n"
    (tmp_path / "f").mkdir()
    shutil.copy(tmp_path / "0.wav", tmp_path / "f" / "a.wav")
    (tmp_path / "f" / "a.txt").write_text("hello there")
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    (tmp_path / "t.tsv").write_text(rows + "broken.wav\thello\n")
    written = {}
    for workers in (1, 2):
        table, folder = SourceConfig("tsv", path=str(tmp_path / "t.tsv")), SourceConfig("folder", str(tmp_path / "f"))
        config = PrepareConfig(str(tmp_path / str(workers)), [table, folder], aligner="none", workers=workers)
        config.split.shares, config.describe.enabled = {"train": 1.0}, True
        Preparation(config).run()
        written[workers] = [
            (tmp_path / str(workers) / name).read_bytes() for name in ("cuts.train.jsonl", "prepared.jsonl")
        ]
    assert written[1] == written[2] and b"unreadable audio" in written[1][1]
    config.workers = 0
    with pytest.raises(ConfigError, match="workers=0"):
        Preparation(config)


@pytest.mark.parametrize("workers", [2, 3])
def test_an_item_that_kills_workers_has_a_result_of_its_own(tmp_path, workers):
    def deadly(i):
        if i in (5, 21) or (i == 40 and not (tmp_path / "once").exists()):
            (tmp_path / "once").touch() if i == 40 else None
            os.kill(os.getpid(), signal.SIGSEGV)
        return i

    found = list(in_processes(always(deadly), range(60), workers, 4, died=lambda i: f"dead {i}"))
    assert found == [f"dead {i}" if i in (5, 21) else i for i in range(60)]
    few = list(in_processes(always(deadly), range(3, 8), workers, 8, died=lambda i: f"dead {i}"))
    assert few == [3, 4, "dead 5", 6, 7]  # not in this process, though one chunk is no work for several
