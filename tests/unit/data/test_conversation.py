"""Which target a visit to a cut draws."""

from collections import Counter
from itertools import islice

import pytest
from lhotse import CutSet
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.data.conversation import ConversationIterator, TargetSelection, read_mtbi, require_cuts
from nemo_mtbi.data.cut_lines import Share
from nemo_mtbi.errors import ConfigError, DataError
from tests.unit.data_helpers import TARGETS, conversations

pytestmark = pytest.mark.unit


STORED = [t.to_dict() for t in TARGETS]


def draws(selection, visits=300, cut="cut"):
    return [selection.select(cut, STORED, v)[0] for v in range(visits)]


def test_tasks_are_drawn_by_weight_and_temperature():
    counts = Counter(t.task for c in range(30) for t in draws(TargetSelection({"repeat": 4, "about": 1}), 40, f"c{c}"))
    assert set(counts) == {"repeat", "about"} and counts["repeat"] / counts["about"] == pytest.approx(4, rel=0.3)
    flat = TargetSelection({"repeat": 4, "about": 1}, temperature=0.0)
    counts = Counter(t.task for c in range(30) for t in draws(flat, 40, f"c{c}"))
    assert counts["repeat"] / counts["about"] == pytest.approx(1, rel=0.2)


def test_every_visit_brings_another_wording_and_the_seed_decides():
    single = TargetSelection({"about": 1.0})
    prompts = [t.prompt_id for t in draws(single, 8)]
    assert len(set(prompts[:4])) == 4 and prompts[:4] == prompts[4:]
    assert (
        draws(TargetSelection(seed=1), 50) == draws(TargetSelection(seed=1), 50) != draws(TargetSelection(seed=2), 50)
    )
    assert len(TargetSelection(every_target=True).select("c", STORED, 0)) == 12
    assert TargetSelection({"sing": 1.0}).select("c", STORED, 0) == []


def test_task_weights_hold_across_cuts_with_one_task_each():
    selection = TargetSelection({"repeat": 4.0, "about": 1.0})
    counts: Counter[str] = Counter()
    for cut in range(200):
        own = [t for t in STORED if t["task"] == ("repeat" if cut % 2 else "about")]
        counts.update(t.task for visit in range(10) for t in selection.select(f"c{cut}", own, visit))
    assert counts["repeat"] == 1000 and counts["repeat"] / counts["about"] == pytest.approx(4.0, rel=0.2)


def test_reader_of_input_cfg(manifest):
    config = OmegaConf.create(
        {
            "type": "mtbi",
            "cuts_path": str(manifest),
            "audio_locator_tag": "<|audio|>",
            "tasks": ["repeat"],
            "force_finite": False,
            "shuffle": False,
            "shard_seed": 0,
        }
    )
    cuts, tarred = read_mtbi(config)
    stream = iter(cuts)
    visits = [next(stream).visit for _ in range(7)]
    assert visits == [0, 0, 0, 1, 1, 1, 2] and not tarred
    with pytest.raises(ConfigError, match="needs cuts_path or shar_path"):
        read_mtbi(OmegaConf.create({"type": "mtbi"}))
    with pytest.raises(DataError, match="No cut has a target for the requested tasks"):
        config.tasks = ["sing"]
        next(iter(read_mtbi(config)[0]))


def test_a_share_without_the_task_waits_for_its_turn(manifest):
    """Only one cut has it: the rank that does not hold that cut in this visit does so in the next."""
    cuts = list(CutSet.from_file(manifest))
    for cut in cuts:
        tasks = ("repeat", "about") if cut is cuts[0] else ("repeat",)
        cut.custom = {"targets": [t.to_dict() for t in TARGETS if t.task in tasks]}
    selection = TargetSelection({"about": 1.0})
    config = OmegaConf.create({"audio_locator_tag": "<|audio|>"})
    for rank in range(2):
        stream = ConversationIterator(Share(CutSet.from_cuts(cuts), None, rank, 2), selection, config)
        found = [(c.source_id, c.visit) for c in islice(iter(stream), 2)]
        assert [visit for _, visit in found] == [rank, rank + 2] and {name for name, _ in found} == {cuts[0].id}


def test_conversations_leave_the_other_targets_behind(manifest):
    found = conversations(manifest, every_target=True)
    assert all("targets" not in (c.cut.custom or {}) for c in found) and len({c.target.key for c in found}) > 1
    assert all("targets" in cut.custom for cut in CutSet.from_file(manifest))


@pytest.mark.parametrize("kind", ["table", "audio", "folder", "text"])
def test_what_is_no_manifest_is_said_first(tmp_path, kind):
    path = tmp_path / {"table": "t.tsv", "audio": "q.wav", "folder": "f", "text": "t.jsonl"}[kind]
    path.mkdir() if kind == "folder" else path.write_text("path\ttranscript\n")
    with pytest.raises(DataError, match="cannot be read as a manifest of cuts"):
        require_cuts(str(path))
