"""Files of targets that a machine has lost, and folders that are not theirs."""

import json

import numpy as np
import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.targets.answers import AnswerFile
from nemo_mtbi.targets.decoder import Answer
from nemo_mtbi.targets.generate import TargetGenerator
from tests.unit.preparation_helpers import tone
from tests.unit.targets_helpers import config, write_cuts

pytestmark = pytest.mark.unit


def answer(key, value):
    return Answer(key, [value, 2], True, np.full((2, 3), value, np.int32), np.full((2, 3), -value, np.float16)), key


def test_an_answer_without_its_arrays_is_missing(tmp_path):
    path = tmp_path / "000000.answers.jsonl"
    with AnswerFile(path, 3, 1.0, "run") as file:
        file.add([answer("a", 1)])
        file.add([answer("b", 2)])
    arrays = path.with_suffix(".bin")
    arrays.write_bytes(arrays.read_bytes()[: arrays.stat().st_size // 2])  # not the journal: another file
    with AnswerFile(path, 3, 1.0, "run") as file:
        assert file.has("a") and not file.has("b")
        file.add([answer("c", 3)])
        file.add([answer("b", 2)])
    with AnswerFile(path, 3, 1.0, "run") as file:
        for key, value in (("a", 1), ("b", 2), ("c", 3)):
            assert file.top_k_of(key)[0].tolist() == [[value] * 3] * 2


def test_what_was_generated_for_another_top_k_is_kept(tmp_path):
    path = tmp_path / "000000.answers.jsonl"
    for top_k in (3, 2):
        with AnswerFile(path, top_k, 1.0, "run") as file:
            assert not file.has("a")
            own, _ = answer("a", 1)
            own.top_ids, own.top_log_probs = own.top_ids[:, :top_k], own.top_log_probs[:, :top_k]
            file.add([(own, "a")])
    for top_k in (3, 2):
        with AnswerFile(path, top_k, 1.0, "run") as file:
            assert file.top_k_of("a")[0].shape == (2, top_k) and file.has("a")


@pytest.mark.parametrize("lost", ["000001.json", "000000.cuts.jsonl"])
def test_a_shard_that_is_not_whole_is_written_again(tmp_path, tiny_llm, lost):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 4)
    path = TargetGenerator(config(tmp_path, tiny_llm, cuts, shard_cuts=2)).run()["train"]
    before = path.read_bytes()
    shards = tmp_path / "targets" / "shards" / "train"
    (shards / lost).write_bytes(b"")
    (shards / "merged.json").unlink()
    assert TargetGenerator(config(tmp_path, tiny_llm, cuts, shard_cuts=2)).run()["train"].read_bytes() == before


def test_folders_that_are_not_its_own_are_not_removed(tmp_path, tiny_llm):
    theirs, recording = tmp_path / "corpus" / "train", Recording.from_file(tone(tmp_path / "a.wav"), recording_id="a")
    spoken = [SupervisionSegment("a", "a", 0, recording.duration, text="hello there")]
    cuts = str(tmp_path / "cuts.jsonl")
    CutSet([MonoCut("a", 0, recording.duration, 0, recording=recording, supervisions=spoken)]).to_file(cuts)
    theirs.mkdir(parents=True)
    (theirs / "a.wav").write_text("speech")
    settings = {"shar_dir": str(theirs.parent), "shard_cuts": 2}
    with pytest.raises(ConfigError, match="would be removed"):
        TargetGenerator(config(tmp_path, tiny_llm, cuts, **settings))
    (theirs / "a.wav").rename(theirs / "noise.000001.tar")  # like a part of a Shar
    with pytest.raises(ConfigError, match="would be removed"):
        TargetGenerator(config(tmp_path, tiny_llm, cuts, **settings))
    (theirs / "noise.000001.tar").unlink()
    (theirs / "cuts.000000.jsonl").write_text(
        json.dumps({"type": "MonoCut", "id": "x", "start": 0, "duration": 1, "channel": 0})
    )
    with pytest.raises(ConfigError, match="would be removed"):  # a corpus in Shar
        TargetGenerator(config(tmp_path, tiny_llm, cuts, **settings))
    (theirs / "cuts.000000.jsonl").unlink()
    for prompts in (1, 2):  # empty, then its own
        TargetGenerator(config(tmp_path, tiny_llm, cuts, tasks_per_cut={"train": prompts}, **settings)).run()
        assert (theirs / "cuts.000000.jsonl.gz").is_file()
    both = config(tmp_path, tiny_llm, str(tmp_path / "targets" / "train.jsonl"))
    both.cuts = {"held_out": str(tmp_path / "targets" / "train.jsonl"), "train": cuts}
    with pytest.raises(ConfigError, match=r"train\.jsonl would replace an input"):
        TargetGenerator(both)
