"""Training goes on where recordings cannot be read, with other batches, and stops where none can."""

from itertools import islice

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.errors import DataError
from nemo_mtbi.preparation.sources import utterance_cut
from nemo_mtbi.training.data_module import UNREADABLE_BATCHES
from tests.helpers import build
from tests.unit.data_helpers import BUCKETS, TARGETS, begun_twice, training_data
from tests.unit.training.test_segments import state_at

pytestmark = pytest.mark.unit


@pytest.fixture
def model(tiny_config):
    return build(tiny_config)


@pytest.fixture
def manifest(tmp_path):
    cuts = []
    for i in range(12):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, np.random.default_rng(i).standard_normal(3200 + 160 * i), 16000)
        custom = {"targets": [t.to_dict() for t in TARGETS]}
        cuts.append(utterance_cut(f"u{i}", path, "one two three", "s", "en", custom))
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    return tmp_path / "cuts.jsonl"


def data(model, manifest, step=0, kept=None, workers=0):
    buffers = {"bucket_buffer_size": 8, "num_cuts_for_bins_estimate": 12, "batch_size": 1, "shard_seed": 7}
    entries = [{"cuts_path": str(manifest)}]
    return training_data(model, entries, step, 0, 1, kept, **buffers, **BUCKETS, num_workers=workers)


def ids(own, count):
    return [b["examples"][0].id.split("/")[0] for b in islice(begun_twice(own.train_dataloader()), count)]


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (2, 0), (0, 4)])
def test_other_batches_come_in_place_of_unreadable_ones(model, manifest, workers, ahead):
    """The first one too; and a resumed run goes on with the next batch, whatever had been read ahead."""
    whole = ids(data(model, manifest), 30)
    broken = {whole[0], whole[3]}
    for name in broken:
        (manifest.parent / f"{name[1:]}.wav").write_bytes(b"no audio")
    expected = [name for name in whole if name not in broken]
    assert ids(data(model, manifest, workers=workers), 20) == expected[:20]
    for step in (1, 5, 14):
        stopped = data(model, manifest, workers=workers)
        ids(stopped, step + ahead)
        resumed = data(model, manifest, step, state_at(stopped, step), workers)
        assert ids(resumed, 20 - step) == expected[step:20]


def test_training_stops_where_nothing_can_be_read(model, manifest):
    batches = begun_twice(data(model, manifest).train_dataloader())
    next(batches)
    for file in manifest.parent.glob("*.wav"):
        file.unlink()
    with pytest.raises(DataError, match=f"No recording of {UNREADABLE_BATCHES} batches"):
        list(batches)


def test_a_lost_mount_is_no_broken_recording(model, manifest, monkeypatch):
    batches = begun_twice(data(model, manifest).train_dataloader())
    next(batches)

    def lost(*_):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr("nemo_mtbi.data.dataset.mono_samples", lost)
    with pytest.raises(DataError, match="not by its own fault .*not connected"):
        next(batches)


def test_validation_leaves_them_out(model, manifest):
    (manifest.parent / "0.wav").unlink()
    cuts = list(data(model, manifest).train_dataloader()._source.sampler.sampler_of(0, None).cuts[0].subset(first=3))
    dataset = MTBIDataset(model.tokenizer, model.cfg.prompt_format)
    assert len(dataset[CutSet(cuts)]["examples"]) in (2, 3)
