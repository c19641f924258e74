"""A run on Lhotse Shar goes on with the next batch, bit for bit, and reads only what is still to come."""

import gzip
import json
import pickle
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from lhotse.shar.readers import lazy
from omegaconf import OmegaConf

from nemo_mtbi.data import shar
from nemo_mtbi.data.shar import SharVisits, with_visits, without_data
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.preparation.sources import utterance_cut
from nemo_mtbi.training.data_module import data_module
from tests.helpers import build
from tests.unit.data_helpers import BUCKETS, TARGETS, begun_twice, training_data, training_loader

pytestmark = pytest.mark.unit


@pytest.fixture
def shars(tmp_path):
    """Two Shars of 20 utterances in shards of 4; the second utterance of each has several targets of a task."""
    for number in range(2):
        cuts = []
        for i in range(20):
            path = tmp_path / f"{number}_{i}.wav"
            noise = np.random.default_rng([number, i]).standard_normal(3200 + 160 * (i % 5))
            soundfile.write(path, 0.1 * noise, 16000)
            custom = {"targets": [t.to_dict() for t in TARGETS]}
            cuts.append(utterance_cut(f"s{number}u{i}", path, "one two three", "s", "en", custom))
        (tmp_path / f"shar{number}").mkdir()
        CutSet(cuts).to_shar(tmp_path / f"shar{number}", {"recording": "wav"}, shard_size=4)
    return tmp_path


def batches(model, shar_path, step, count, workers=0, rank=0, ranks=1, **entry):
    """Ids and audio of training batches from ``step`` on."""
    buffers = {"bucket_buffer_size": 24, "shuffle_buffer_size": 12, "num_cuts_for_bins_estimate": 20}
    entry = {"shar_path": shar_path, "seed": 7, **entry}
    loader = training_loader(model, entry, step, rank, ranks, num_workers=workers, batch_size=2, **buffers, **BUCKETS)
    return [([e.id for e in b["examples"]], b["audios"].double()) for b in islice(begun_twice(loader), count)]


def same(got, expected):
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_resumed_run_goes_on_with_the_next_batch(shars, tiny_config, workers, mixed):
    model = build(tiny_config)
    path = [[str(shars / "shar0"), 1.0], [str(shars / "shar1"), 3.0]] if mixed else str(shars / "shar0")
    whole = batches(model, path, 0, 40, workers, perturb_speed=[0.9])
    assert len({i for ids, _ in whole for i in ids}) > 20  # several visits, with other targets and other speeds
    for step in (3, 24):
        assert same(batches(model, path, step, 40 - step, workers, perturb_speed=[0.9]), whole[step:])


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_of_shars_are_shares(shars, tiny_config, workers):
    """Not the order within a pass, as where each is read once."""
    path = [[str(shars / "shar0"), 1.0], [str(shars / "shar1"), 4.0]]
    drawn = [i for ids, _ in batches(build(tiny_config), path, 0, 100, workers) for i in ids]
    share = sum(i.startswith("s1") for i in drawn) / len(drawn)
    assert share == pytest.approx(0.8, abs=0.08)


def test_ranks_and_workers_ask_a_cut_different_things(shars, tiny_config):
    """Each reads the whole Shar, so their first pass is not that of one process: tasks, wordings and speeds differ."""
    model, found = build(tiny_config), {}
    for rank in range(4):
        path = str(shars / "shar0")
        for ids, _ in batches(model, path, 0, 20, workers=2, rank=rank, ranks=4, perturb_speed=[0.9, 1.1]):
            for name in ids:
                cut, _, asked = name.partition("/")
                found.setdefault(cut, set()).add(asked)
    assert np.mean([len(asked) for asked in found.values()]) > 4  # of 12, in 8 draws


def test_a_broken_shard_is_named(shars, tiny_config):
    part = sorted((shars / "shar0").glob("recording.*.tar"))[2]
    part.write_bytes(part.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"shar0/cuts.000002.jsonl.gz .*cannot be read any further"):
        list(SharVisits(CutSet.from_shar(in_dir=shars / "shar0").data))


def test_ranks_without_workers_draw_differently(shars, tiny_config):
    model = build(tiny_config)
    first, second = (batches(model, str(shars / "shar0"), 0, 5, rank=rank, ranks=2) for rank in range(2))
    assert [ids for ids, _ in first] != [ids for ids, _ in second]
    assert same(batches(model, str(shars / "shar0"), 2, 3, rank=1, ranks=2), second[2:])


def test_what_was_trained_on_is_not_read_again(shars, tiny_config, monkeypatch):
    """Of 100 batches skipped only what waits in the buffers is read: no more than a new run reads before its first
    batch, though it is spread over all shards."""
    read = []
    tar, parse = lazy.TarIterator, shar.parse_tarinfo

    class Counted(tar):
        def __iter__(self):
            for item in super().__iter__():
                read.append(1)
                yield item

    monkeypatch.setattr(lazy, "TarIterator", Counted)
    monkeypatch.setattr(shar, "parse_tarinfo", lambda *member: read.append(0.5) or parse(*member))
    model, path = build(tiny_config), str(shars / "shar0")
    assert len(batches(model, path, 0, 1)) == 1
    begun = sum(read)
    read.clear()
    assert len(batches(model, path, 100, 1)) == 1
    assert 0 < sum(read) <= begun


def test_fields_without_data_are_there_at_once(shars):
    """Targets as a field of their own, in JSON lines, decide what is drawn."""
    folder = shars / "shar0"
    for cuts in folder.glob("cuts.*.jsonl.gz"):
        rows = [json.loads(line) for line in gzip.decompress(cuts.read_bytes()).splitlines()]
        with gzip.open(folder / cuts.name.replace("cuts", "targets"), "wt") as file:
            file.writelines(
                json.dumps({"cut_id": row["id"], "targets": row["custom"].pop("targets")}) + "\n" for row in rows
            )
        with gzip.open(cuts, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    cuts, _ = with_visits(CutSet.from_shar(in_dir=folder))
    with without_data():
        drawn = list(cuts)
    assert all(len(cut.targets) == len(TARGETS) for cut in drawn)
    assert drawn[7].promised.read().load_audio().shape[1] == drawn[7].num_samples


@pytest.mark.parametrize("compress", [False, True])
def test_promised_cuts_are_those_of_a_whole_reading(shars, compress, tmp_path):
    """From tar files on a disk, and from what can only be read through."""
    folder = shars / "shar1"
    if compress:
        for file in folder.glob("*.tar"):
            file.with_suffix(".tar.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    expected = {cut.id: cut for cut in CutSet.from_shar(in_dir=folder)}
    cuts, _ = with_visits(CutSet.from_shar(in_dir=folder))
    with without_data():
        drawn = list(cuts)[1::3]
    for cut in drawn:
        read, whole = cut.promised.read(), expected[cut.id]
        assert np.array_equal(read.load_audio(), whole.load_audio())
        assert read.recording.duration == whole.recording.duration and read.targets == whole.targets


def test_a_map_dataset_of_shar_is_refused(shars, tiny_config):
    section = {"input_cfg": [{"type": "mtbi", "shar_path": str(shars / "shar0")}], "force_map_dataset": True}
    with pytest.raises(ConfigError, match="force_map_dataset=true: Shar is read by"):
        data_module(OmegaConf.create({"cached_features": False, "train_ds": section}), build(tiny_config))


def test_promises(shars, tmp_path):
    """Cuts of a shard are read together, those that nobody waits for are not, and a Shar that changed is noticed."""
    cuts, [reader] = with_visits(CutSet.from_shar(in_dir=shars / "shar0", shuffle_shards=True, seed=3))
    expected = [cut.load_audio() for cut in cuts]
    stream = iter(cuts)
    with without_data():
        drawn = [next(stream) for _ in range(6)]
    later = list(stream)  # from the middle of a shard on with data
    assert all(np.array_equal(c.load_audio(), e) for c, e in zip(later, expected[6:], strict=True))
    promises = [cut.promised for cut in drawn]
    assert np.array_equal(promises[1].read().load_audio(), expected[1])
    assert promises[0].cut is not None and promises[4].cut is None
    assert not any(reader.promised[promises[0].shard])
    assert [c.id for c in pickle.loads(pickle.dumps(reader))] == [c.id for c in drawn + later]
    file = reader.source.shards[promises[4].shard]["cuts"]
    other = next(shard["cuts"] for shard in reader.source.shards if shard["cuts"] != file)
    file.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="cannot be read any further|Did the Shar change"):
        promises[4].read()


def test_slices_of_shards_are_read_as_lhotse_reads_them(shars):
    source = CutSet.from_shar(in_dir=shars / "shar0", shuffle_shards=True, seed=3, slice_length=2)
    ids = [cut.id for cut in source]
    own, [reader] = with_visits(CutSet.from_shar(in_dir=shars / "shar0", shuffle_shards=True, seed=3, slice_length=2))
    with without_data():
        assert [cut.id for cut in own] == ids and len(ids) == 10
    assert isinstance(own.data, SharVisits) and not reader.promised


def test_few_cuts_that_hold_their_audio_are_kept_for_shuffling(shars, tiny_config):
    model, shar = build(tiny_config), {"shar_path": str(shars / "shar0"), "seed": 7}

    def kept(entry, **section):
        return training_data(model, [entry], batch_size=2, **section).cfg.train_ds.shuffle_buffer_size

    assert kept({"cuts_path": "pipe:cat x"}) == 10_000  # Lhotse adds them to bucket_buffer_size
    assert kept(shar, **BUCKETS) is None and kept(shar) == 500
    for section in ({}, {"bucket_buffer_size": 24, "num_cuts_for_bins_estimate": 20, **BUCKETS}):
        loader = training_loader(model, shar, batch_size=2, **section)
        ids = [e.id for batch in islice(iter(loader), 20) for e in batch["examples"]]
        assert ids != sorted(ids)
