"""Cuts with targets for the tests of training data."""

from lhotse import CutSet
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.data.conversation import ConversationIterator, TargetSelection
from nemo_mtbi.data.cut_lines import Share
from nemo_mtbi.data.target import Target


def target(task, prompt, ids=(5, 6, 2), **kwargs):
    return Target(f"{task}{prompt}", task, f"{task}-{prompt}", f"Prompt {prompt}.", "answer", list(ids), **kwargs)


TARGETS = [target(task, i) for task in ("repeat", "about", "rewrite") for i in range(4)]


def conversations(manifest, **selection):
    config = OmegaConf.create({"audio_locator_tag": "<|audio|>", "force_finite": True})
    return list(ConversationIterator(Share(CutSet.from_file(manifest)), TargetSelection(**selection), config))
