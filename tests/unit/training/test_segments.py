"""Batches are drawn in segments: nothing is lost or doubled between them, and a resumed run draws little again."""

import gc
import gzip
import random
import weakref
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from lhotse.shar.readers.tar import parse_tarinfo

from nemo_mtbi.data import cut_lines, shar
from nemo_mtbi.data.cut_lines import readable
from nemo_mtbi.data.shar import SharVisits
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
        CutSet.from_cuts(cuts).to_file(tmp_path / f"whole{number}.jsonl")
        lines = (tmp_path / f"whole{number}.jsonl").read_text().splitlines()
        (tmp_path / f"{number}.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")
    return tmp_path


@pytest.fixture
def model(tiny_config):
    return build(tiny_config)


def as_shar(folder, number):
    """The utterances of a manifest, in shards of 4."""
    if not (made := folder / f"shar{number}").is_dir():
        made.mkdir()
        CutSet.from_file(folder / f"whole{number}.jsonl").to_shar(made, {"recording": "wav"}, shard_size=4)
    return str(made)


def drawing(model, folder, step=0, rank=0, ranks=1, kept=None, mixed=False, workers=0, shar=False, **section):
    """``mixed``: two entries. ``shar``: of Shar; "mixed": the second one alone; "weighted": both in one entry."""
    entries = [{"cuts_path": str(folder / "0.jsonl"), "weight": 1.0}]
    entries += [{"cuts_path": str(folder / "1.jsonl"), "weight": 2.0}] * mixed
    if shar == "weighted":
        entries = [{"shar_path": [[as_shar(folder, 0), 1.0], [as_shar(folder, 1), 2.0]]}]
    elif shar:
        for number in range(shar == "mixed", len(entries)):
            entries[number] = {"shar_path": as_shar(folder, number), "weight": 1.0 + number}
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


DRAWN_HERE = [{}, {"mixed": True}, {"workers": 2}, {"use_bucketing": False}, {"ranks": 2}]
DRAWN_BY_WORKERS = [
    {"shar": True},
    {"shar": True, "workers": 2, "mixed": True},
    {"shar": True, "workers": 3, "ranks": 2, "use_bucketing": False},
    {"shar": "mixed", "mixed": True, "workers": 2, "force_iterable_dataset": True},
    {"shar": "weighted", "workers": 2},
    {"force_iterable_dataset": True, "workers": 2, "mixed": True},
]


@pytest.mark.parametrize("changes", [*DRAWN_HERE, *DRAWN_BY_WORKERS])
def test_a_resumed_run_goes_on_with_the_next_batch(manifests, model, changes):
    expected = batches(drawing(model, manifests, **changes), 26)
    drawing_processes = 1 if changes in DRAWN_HERE else max(changes.get("workers", 0), 1)
    for step in (2, 3, 13, 25) if drawing_processes == 1 else (SEGMENT * drawing_processes, 13):
        stopped = drawing(model, manifests, **changes)
        batches(stopped, step)
        states = state_at(stopped, step)
        states["ranks"] *= changes.get("ranks", 1)  # those of other processes are gathered
        resumed = drawing(model, manifests, step, kept=states, **changes)
        assert same(batches(resumed, 26 - step), expected[step:])
        assert resumed.first_segment == step // drawing_processes // SEGMENT


@pytest.mark.parametrize("shar", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_is_lost_or_doubled_between_segments(manifests, model, mixed, shar):
    data = drawing(model, manifests, mixed=mixed, shar=shar)
    drawn = Counter(example for ids, _ in batches(data, 150) for example in ids)
    cuts = {(id.split("/")[0], visit) for id, visit in drawn}
    assert set(drawn.values()) == {1} and len(cuts) == len(drawn)
    for name, size in (("m0", 20), ("m1", 12)) if mixed else (("m0", 20),):
        whole = Counter(visit for cut, visit in cuts if cut.startswith(name))
        assert [whole[visit] for visit in range(2)] == [size, size]


def test_little_is_drawn_again(manifests, model, monkeypatch):
    stopped = drawing(model, manifests)
    expected = batches(stopped, 101)
    state = state_at(stopped, 100)
    read, parsed = [], cut_lines.decode_json_line
    monkeypatch.setattr(cut_lines, "decode_json_line", lambda *line: read.append(line) or parsed(*line))
    assert same(batches(drawing(model, manifests, 100, kept=state), 1), expected[100:])
    few = len(read)
    read.clear()
    assert same(batches(drawing(model, manifests, 100), 1), expected[100:])  # without a state: from the beginning
    assert few < 70 and len(read) > 200


@pytest.mark.parametrize("kept", [True, False])
def test_little_of_shar_is_drawn_again(manifests, model, monkeypatch, kept):
    """Neither its metadata, nor the data of what was trained on or waits without being needed yet."""
    stopped = drawing(model, manifests, shar=True)
    expected = batches(stopped, 101)
    state = state_at(stopped, 100) if kept else None
    drawn, read = [], []
    monkeypatch.setattr(shar, "readable", lambda cuts, name: (drawn.append(1) or cut for cut in readable(cuts, name)))
    monkeypatch.setattr(shar, "parse_tarinfo", lambda *member: read.append(0.5) or parse_tarinfo(*member))
    resumed = drawing(model, manifests, 100, shar=True, kept=state, num_cuts_for_bins_estimate=4)
    resumed.cfg.train_ds.bucket_duration_bins = [1.0]
    assert len(batches(resumed, 1)) == 1
    assert (len(drawn) < 90) == kept and len(read) < 40
    assert same(batches(drawing(model, manifests, 100, shar=True, kept=state), 1), expected[100:])


def test_what_waits_at_the_end_of_a_segment_is_not_read_again(manifests, model, monkeypatch):
    read = []
    monkeypatch.setattr(SharVisits, "at", lambda *_: read.append(1))
    batches(drawing(model, manifests, shar=True), 40)
    assert not read


def test_a_shar_whose_shards_lost_cuts_is_named(manifests, model):
    stopped = drawing(model, manifests, shar=True)
    batches(stopped, 4)
    state = state_at(stopped, 4)
    for shard in (manifests / "shar0").glob("cuts.*"):
        shard.write_bytes(gzip.compress(gzip.decompress(shard.read_bytes()).splitlines(keepends=True)[0]))
    with pytest.raises(DataError, match="Did the Shar change since the run was stopped"):
        batches(drawing(model, manifests, 4, shar=True, kept=state), 1)


def test_what_has_no_places_is_drawn_up_to_its_place(manifests, model):
    """Slices of shards, several Shars in the shares of their sizes, and streams that may be opened twice."""
    paths = [as_shar(manifests, 0), as_shar(manifests, 1)]
    sliced, few = {"slice_length": 3}, {"max_open_streams": 2}
    each = [{"type": "mtbi", "shar_path": path, "weight": 1.0} for path in paths]
    both = {"type": "group", "input_cfg": each}
    for entry, more in (
        ({"shar_path": paths[0], **sliced}, {}),
        ({"shar_path": paths[0]}, sliced),
        ({"shar_path": paths}, {}),
        ({**both, **few}, {}),
        (both, few),
    ):
        section = {"batch_size": 2, "shuffle_buffer_size": 8, **more}
        whole = training_data(model, [entry], **section)
        expected = batches(whole, 9)
        assert not whole.in_segments and "places" not in state_at(whole, 6)["ranks"][0]
        assert same(batches(training_data(model, [entry], 6, **section), 3), expected[6:])


def test_a_state_of_another_number_of_ranks_is_left_alone(manifests, model):
    stopped = drawing(model, manifests)
    batches(stopped, 7)
    resumed = drawing(model, manifests, 7, ranks=2, kept=state_at(stopped, 7))
    assert same(batches(resumed, 4), batches(drawing(model, manifests, ranks=2), 11)[7:])


@pytest.mark.parametrize("source", [{}, {"shar": True, "workers": 2}])
def test_a_state_passes_through_a_checkpoint(manifests, model, tmp_path, source):
    stopped = drawing(model, manifests, mixed=True, **source)
    expected = batches(stopped, 14)
    torch.save({"data": state_at(stopped, 10)}, tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", mmap=True, weights_only=True)["data"]
    resumed = drawing(model, manifests, 10, kept=state, mixed=True, **source)
    assert same(batches(resumed, 4), expected[10:]) and resumed.first_segment


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
    (manifests / "0.jsonl").write_text(lines[0] + "\n" * len(lines))
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


@pytest.mark.parametrize("shar", [False, True])
@pytest.mark.parametrize("change", [{"max_duration": 0.45}, {"tasks": {"repeat": 0.05, "other": 1.0}}])
def test_what_the_configuration_has_no_more_is_left_out(manifests, model, shar, change, caplog):
    stopped = drawing(model, manifests, mixed=True, shar=shar)
    batches(stopped, 10)
    state = state_at(stopped, 10)
    resumed = drawing(model, manifests, 10, kept=state, mixed=True, shar=shar, **change)
    if "tasks" in change:
        del resumed.cfg.train_ds["tasks"]
        for entry in resumed.cfg.train_ds.input_cfg:
            entry.tasks = change["tasks"]
    assert len(batches(resumed, 5)) == 5 and resumed.first_segment
    assert "examples that were still to be trained on are left out" in caplog.text


@pytest.mark.parametrize("change", ["lines", "seed", "batch_size", "shards"])
def test_where_the_order_is_another_one_places_mean_nothing(manifests, model, change, caplog):
    shar = change == "shards"
    stopped = drawing(model, manifests, shar=shar)
    batches(stopped, 10)
    state = state_at(stopped, 10)
    more = {"seed": {"shard_seed": 8}, "batch_size": {"batch_size": 3}}.get(change, {})
    if change == "lines":
        lines = (manifests / "0.jsonl").read_text()
        (manifests / "0.jsonl").write_text(lines + lines.splitlines()[0].replace("m0u0", "m0u20") + "\n")
    if shar:
        for file in (manifests / "shar0").glob("*.000001.*"):
            file.rename(file.with_name(file.name.replace("000001", "000009")))
        for file in (manifests / "shar0").glob("*.000004.*"):
            file.unlink()
    resumed = drawing(model, manifests, 10, kept=state, shar=shar, **more)
    assert len(batches(resumed, 5)) == 5 and resumed.first_segment == 0
    assert "other than before" in caplog.text


@pytest.mark.parametrize("workers", [0, 3])
def test_unreadable_recordings_and_segments(manifests, model, workers):
    """A batch of them is no batch for training, but one for who draws. Resumed twice."""
    for name in ("0_3", "0_7", "0_11", "1_2", "1_5"):
        (manifests / f"{name}.wav").write_bytes(b"no recording")
    changes = {"mixed": True, "batch_size": 1, "workers": workers, "force_iterable_dataset": workers > 0}
    whole = drawing(model, manifests, **changes)
    expected = batches(whole, 36)
    assert len(whole.readable.places) > 3
    for step in (5, 9, 18, 26) if not workers else (26,):
        stopped = drawing(model, manifests, **changes)
        batches(stopped, step + 3)  # read ahead
        resumed = drawing(model, manifests, step, kept=state_at(stopped, step), **changes)
        assert same(batches(resumed, 6), expected[step : step + 6])
        again = drawing(model, manifests, step + 5, kept=state_at(resumed, step + 5), **changes)
        assert same(batches(again, 4), expected[step + 5 : step + 9])
        assert again.first_segment


def test_what_was_trained_on_is_not_kept(manifests, model, monkeypatch):
    """Examples of Shar hold their audio."""
    trained, taken = [], segments.Drawn.taken

    def noted(self, batch):
        trained.extend(weakref.ref(example) for example in batch)
        taken(self, batch)

    monkeypatch.setattr(segments.Drawn, "taken", noted)
    monkeypatch.setattr(ResumableData, "segment_batches", 10)
    for number, _ in enumerate(islice(iter(drawing(model, manifests, shar=True).train_dataloader()), 30)):
        if number % 10 != 8:
            continue
        gc.collect()
        assert sum(reference() is not None for reference in trained) <= 4  # batches of 2: that of now


def test_segments_ranks_and_workers_draw_by_seeds_of_their_own(manifests, model):
    found = []
    for rank in range(4):
        data = drawing(model, manifests, shar=True, rank=rank, ranks=4)
        sampler_of = data.train_dataloader()._source.dataset.sources[0].sampler_of
        found += [sampler_of(number, None).seed for number in range(4)]
    assert len(set(found)) == 16


@pytest.mark.parametrize("waiting", [0, 4000])
def test_places_are_small_in_checkpoints(waiting):
    """They are those of all ranks and workers."""
    random_lines = torch.randperm(10_000_000)[:waiting]
    at = torch.arange(waiting).mul(2) + 7_000_000
    columns = [torch.arange(waiting) % 3, torch.full((waiting,), 2), at, random_lines, torch.zeros_like(at)]
    place = segments.Place(torch.tensor([[2, 9, 0]]), torch.stack(columns, 1))
    kept = place.packed()
    again = segments.Place.unpacked(kept)
    assert torch.equal(again.waiting, place.waiting) and torch.equal(again.last, place.last)
    assert kept["waiting"].numel() < 25_000


def test_places_of_before_are_forgotten(manifests, model):
    data = drawing(model, manifests)
    batches(data, 40)
    assert len(data.places[0]) == segments.KEPT_PLACES
    workers = drawing(model, manifests, shar=True, workers=2)
    batches(workers, 40)
    assert [len(own) for own in workers.places.values()] == [segments.KEPT_PLACES] * 2
