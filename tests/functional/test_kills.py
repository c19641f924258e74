"""`mtbi prepare` and `mtbi cache`, killed at random moments again and again: nothing is lost or doubled."""

import json
import random
import time

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from nemo_mtbi.data.feature_cache import FEATURES_FIELD
from tests.launching import Started, killed_until_done, launch

pytestmark = [pytest.mark.functional, pytest.mark.slow]
KILLS, UTTERANCES, ENCODED = 25, 8000, 1600  # enough for a fast machine not to be done before


def interrupted(name, arguments, progress):
    """How often the launcher was killed, after it had done something more, before it ended by itself."""
    before = 0

    def start():
        nonlocal before
        before = progress()
        return Started(name, arguments)

    def wait(process):
        while process.poll() is None and progress() <= before:
            time.sleep(0.01)

    return killed_until_done(start, wait, lambda process: process.poll() == 0, KILLS, random.Random(0), 0.1)


def size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng, rows = np.random.default_rng(0), ["path\ttranscript\tspeaker"]
    for i in range(UTTERANCES):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(8000 + 800 * (i % 7)), 16000)
        rows.append(f"{folder}/{i}.wav\tone two three\ts{i % 20}")
    (folder / "corpus.tsv").write_text("\n".join(rows) + "\n")
    return folder


def prepare(corpus, output):
    source = f"sources=[{{kind: tsv, path: {corpus}/corpus.tsv}}]"
    return [f"output_dir={output}", source, "aligner=none", "workers=2"]


@pytest.fixture(scope="module")
def prepared(corpus):
    launch("prepare_data", *prepare(corpus, corpus / "whole"))
    return corpus / "whole"


def test_prepare(corpus, prepared):
    output = corpus / "killed"
    killed = interrupted("prepare_data", prepare(corpus, output), lambda: size(output))
    assert killed > 0.8 * KILLS
    for file in prepared.glob("cuts.*.jsonl"):
        assert (output / file.name).read_text() == file.read_text()


def test_cache(prepared, tiny_whisper, tiny_llm, tmp_path):
    model = ["speech_llm@model=offline", f"model.pretrained_asr={tiny_whisper}", f"model.pretrained_llm={tiny_llm}"]
    lines = (prepared / "cuts.train.jsonl").read_text().splitlines(keepends=True)[:ENCODED]
    found = []
    for name in ("whole", "killed"):
        manifest = tmp_path / name / "cuts.jsonl"
        manifest.parent.mkdir()
        manifest.write_text("".join(lines))
        arguments = [f"manifests=[{manifest}]", "batch_seconds=4.0", "workers=2", *model]
        if name == "whole":
            launch("cache_features", *arguments)
        else:
            killed = interrupted("cache_features", arguments, lambda folder=manifest.parent: size(folder))
            assert killed >= KILLS // 2
        cuts = list(CutSet.from_file(manifest))
        assert [cut.id for cut in cuts] == [json.loads(line)["id"] for line in lines]
        found.append({cut.id: np.array(cut.load_custom(FEATURES_FIELD)) for cut in cuts})
    assert all(np.array_equal(found[0][i], found[1][i]) for i in found[0])
