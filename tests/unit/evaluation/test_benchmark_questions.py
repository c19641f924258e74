"""What the benchmark asks, and of which cuts."""

from types import SimpleNamespace

import pytest
from lhotse import CutSet
from omegaconf import OmegaConf

from nemo_mtbi.data.target import NO_SPEECH
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.evaluation.benchmark import Benchmark, check_names, spoken_cuts
from nemo_mtbi.evaluation.corpora import READERS
from nemo_mtbi.evaluation.labelled import LabelledConfig
from nemo_mtbi.evaluation.run_report import _last_samples
from tests.unit.targets_helpers import write_cuts

pytestmark = pytest.mark.unit


def test_recordings_in_which_nothing_is_said_are_not_asked(tmp_path):
    manifest = write_cuts(tmp_path / "cuts.jsonl", 3)
    cuts = list(CutSet.from_file(manifest))
    cuts[0].custom = {NO_SPEECH: True}
    CutSet(cuts).to_file(manifest)
    assert [cut.id for cut in spoken_cuts(manifest)] == [cut.id for cut in cuts[1:]]
    for cut in cuts:
        cut.custom = {NO_SPEECH: True}
    CutSet(cuts).to_file(manifest)
    names = {"systems": {}, "cascade": False, "normalized_cascade": False, "baseline": "text_topline", "labelled": None}
    numbers = {"resamples": 100, "batch_size": 1, "latency_utterances": 0, "compare_with": [], "no_speech": None}
    with pytest.raises(ConfigError, match=r"cuts.test: nothing is said .* no_speech"):
        check_names(OmegaConf.create({"cuts": {"test": str(manifest)}, **names, **numbers}))


def test_wordings_are_of_the_languages_that_are_asked_for():
    benchmark = Benchmark.__new__(Benchmark)
    keys = ("llm", "llm_dtype", "prompts_per_task", "max_new_tokens")
    benchmark.cfg = OmegaConf.create({**dict.fromkeys(keys), "languages": ["de", "en"]})
    config = SimpleNamespace(pretrained_llm="x", speech_position="after")
    benchmark.model = SimpleNamespace(config=config, cfg=SimpleNamespace(prompt_format="chatml"))
    assert benchmark._target_settings(None)["languages"] == ["de", "en"]


def test_an_attribute_that_no_task_asks_for_is_named(tmp_path):
    manifest = str(write_cuts(tmp_path / "cuts.jsonl", 1))
    with pytest.raises(DataError, match="'rate' is none of"):
        list(READERS["voice"](LabelledConfig("voice", manifest, split="gender, rate"), tmp_path))


def test_a_run_without_samples_has_a_report(tmp_path):
    assert _last_samples(tmp_path) == []
