"""Batches are drawn in segments: nothing is lost or doubled between them, and a resumed run draws little again."""

import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from nemo_mtbi.data import cut_lines
from nemo_mtbi.errors import DataError
from nemo_mtbi.preparation.sources import utterance_cut
from nemo_mtbi.training import segments
from nemo_mtbi.training.data_module import ResumableData
from tests.helpers import build
from tests.unit.data_helpers import BUCKETS, TARGETS, begun_twice, training_data

pytestmark = pytest.mark.unit
SEGMENT = 3


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(ResumableData, "segment_batches", SEGMENT)


@pytest.fixture
def manifests(tmp_path):
    """20 and 12 utterances of different lengths; a blank line between two of them."""
    for number, size in enumerate((20, 12)):
        cuts = []
        for i in range(size):
            path = tmp_path / f"{number}_{i}.wav"
            soundfile.write(path, np.random.default_rng([number, i]).standard_normal(3200 + 1600 * (i % 5)), 16000)
            custom = {"targets": [t.to_dict() for t in TARGETS]}
            cuts.append(utterance_cut(f"m{number}u{i}", path, "one two three", "s", "en", custom))
        CutSet.from_cuts(cuts).to_file(tmp_path / f"{number}.jsonl")
        lines = (tmp_path / f"{number}.jsonl").read_text().splitlines()
        (tmp_path / f"{number}.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")
    return tmp_path


@pytest.fixture
def model(tiny_config):
    return build(tiny_config)


def drawing(model, folder, step=0, rank=0, ranks=1, kept=None, mixed=False, workers=0, **section):
    entries = [{"cuts_path": str(folder / "0.jsonl"), "weight": 1.0}]
    entries += [{"cuts_path": str(folder / "1.jsonl"), "weight": 2.0}] * mixed
    buffers = {"bucket_buffer_size": 8, "num_cuts_for_bins_estimate": 20, "batch_size": 2, "shard_seed": 7}
    section = {**buffers, **BUCKETS, "num_workers": workers, **section}
    return training_data(model, entries, step, rank, ranks, kept, **section)


def batches(data, count):
    """Ids, visits and audio of training batches."""
    loader = begun_twice(data.train_dataloader())
    return [([(e.id, e.visit) for e in b["examples"]], b["audios"].double()) for b in islice(loader, count)]


def state_at(data, step):
    data.trainer = SimpleNamespace(global_step=step)
    return data.state_dict()


def same(got, expected):
    return len(got) == len(expected) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("changes", [{}, {"mixed": True}, {"workers": 2}, {"use_bucketing": False}, {"ranks": 2}])
def test_a_resumed_run_goes_on_with_the_next_batch(manifests, model, changes):
    whole = drawing(model, manifests, **changes)
    expected = batches(whole, 26)
    for step in (2, 3, 13, 25):
        stopped = drawing(model, manifests, **changes)
        batches(stopped, step)
        states = state_at(stopped, step)
        states["ranks"] *= changes.get("ranks", 1)  # those of other processes are gathered
        resumed = drawing(model, manifests, step, kept=states, **changes)
        assert same(batches(resumed, 26 - step), expected[step:])
        assert step < SEGMENT or resumed.segments.first[0] == step // SEGMENT


@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_is_lost_or_doubled_between_segments(manifests, model, mixed):
    drawn = Counter(example for ids, _ in batches(drawing(model, manifests, mixed=mixed), 150) for example in ids)
    cuts = {(id.split("/")[0], visit) for id, visit in drawn}
    assert set(drawn.values()) == {1} and len(cuts) == len(drawn)
    for name, size in (("m0", 20), ("m1", 12)) if mixed else (("m0", 20),):
        whole = Counter(visit for cut, visit in cuts if cut.startswith(name))
        assert [whole[visit] for visit in range(2)] == [size, size]


def test_little_is_drawn_again(manifests, model, monkeypatch):
    stopped = drawing(model, manifests)
    expected = batches(stopped, 101)
    state = state_at(stopped, 100)
    read, parsed = [], cut_lines.jsonl.parsed
    monkeypatch.setattr(cut_lines.jsonl, "parsed", lambda *line: read.append(line) or parsed(*line))
    assert same(batches(drawing(model, manifests, 100, kept=state), 1), expected[100:])
    few = len(read)
    read.clear()
    assert same(batches(drawing(model, manifests, 100), 1), expected[100:])  # without a state: from the beginning
    assert few < 70 and len(read) > 200


def test_a_state_of_another_number_of_ranks_is_left_alone(manifests, model):
    stopped = drawing(model, manifests)
    batches(stopped, 7)
    resumed = drawing(model, manifests, 7, ranks=2, kept=state_at(stopped, 7))
    assert same(batches(resumed, 4), batches(drawing(model, manifests, ranks=2), 11)[7:])


def test_a_state_passes_through_a_checkpoint(manifests, model, tmp_path):
    stopped = drawing(model, manifests, mixed=True)
    expected = batches(stopped, 14)
    torch.save({"data": state_at(stopped, 10)}, tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", mmap=True, weights_only=True)["data"]
    assert same(batches(drawing(model, manifests, 10, kept=state, mixed=True), 4), expected[10:])


def test_a_new_segment_leaves_the_random_numbers_of_training_alone(manifests, model):
    loader = begun_twice(drawing(model, manifests).train_dataloader())
    next(loader)
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    list(islice(loader, 3 * SEGMENT))
    after = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_a_manifest_that_lost_its_lines_is_named(manifests, model):
    stopped = drawing(model, manifests)
    batches(stopped, 4)
    state = state_at(stopped, 4)
    lines = (manifests / "0.jsonl").read_text().splitlines()
    (manifests / "0.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(DataError, match="still to be trained on"):
        batches(drawing(model, manifests, 4, kept=state), 1)


def test_other_manifests_than_before_are_drawn_from_their_beginning(manifests, model):
    stopped = drawing(model, manifests)
    batches(stopped, 7)
    state = state_at(stopped, 7)
    resumed = drawing(model, manifests, 7, kept=state, mixed=True)
    assert same(batches(resumed, 4), batches(drawing(model, manifests, mixed=True), 11)[7:])


def test_given_buckets(manifests, model):
    """Of one dimension, and of two with batch sizes of their own."""
    changes = {"bucket_duration_bins": [30.0]}
    expected = batches(drawing(model, manifests, **changes), 12)
    stopped = drawing(model, manifests, **changes)
    batches(stopped, 7)
    assert same(batches(drawing(model, manifests, 7, kept=state_at(stopped, 7), **changes), 5), expected[7:])
    two = {"bucket_duration_bins": [[40, 10], [200, 60]], "bucket_batch_size": [3, 2], "batch_size": None}
    found = batches(drawing(model, manifests, **two, measure_total_length=False), 8)
    assert len(found) == 8


def test_places_of_before_are_forgotten(manifests, model):
    data = drawing(model, manifests)
    batches(data, 40)
    assert len(data.segments.places) == segments.KEPT_PLACES
