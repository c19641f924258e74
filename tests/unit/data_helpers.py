"""Cuts with targets for the tests of training data."""

from lhotse import CutSet
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.data.conversation import ConversationIterator, TargetSelection
from nemo_mtbi.data.cut_lines import Share
from nemo_mtbi.data.target import Target
from nemo_mtbi.training.data_module import data_module

BUCKETS = {"use_bucketing": True, "num_buckets": 2, "concurrent_bucketing": False}


def target(task, prompt, ids=(5, 6, 2), **kwargs):
    return Target(f"{task}{prompt}", task, f"{task}-{prompt}", f"Prompt {prompt}.", "answer", list(ids), **kwargs)


TARGETS = [target(task, i) for task in ("repeat", "about", "rewrite") for i in range(4)]


def conversations(manifest, **selection):
    config = OmegaConf.create({"audio_locator_tag": "<|audio|>", "force_finite": True})
    return list(ConversationIterator(Share(CutSet.from_file(manifest)), TargetSelection(**selection), config))


def training_data(model, entries, step=0, rank=0, ranks=1, kept=None, **section):
    """The data module of a training section with some entries of ``input_cfg``, for a rank, from ``step`` on."""
    train = {
        "input_cfg": [{"type": "mtbi", **entry} for entry in entries],
        "shuffle": True,
        "seed": 7,
        "num_workers": 0,
        "use_multimodal_sampling": True,
        "measure_total_length": True,
        **section,
    }
    data = data_module(OmegaConf.create({"cached_features": False, "train_ds": train}), model, step, kept=kept)
    data._get_dp_rank, data._get_world_size = lambda: rank, lambda: ranks
    return data


def training_loader(model, entry, step=0, rank=0, ranks=1, **section):
    """The loader of a training section with one entry, for a rank, from ``step`` on."""
    return training_data(model, [entry], step, rank, ranks, **section).train_dataloader()


def begun_twice(loader):
    """The loader's batches, as Lightning takes them: an iterator is made and dropped first."""
    dropped = iter(loader)
    del dropped
    return iter(loader)
