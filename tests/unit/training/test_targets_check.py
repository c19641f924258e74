"""What does not fit a run is said before training, not at the first step of imitation."""

import copy
import json

import pytest
from lhotse import CutSet
from omegaconf import OmegaConf

from nemo_mtbi.data.chat_template import dialect, template_digest
from nemo_mtbi.data.target import TARGETS_FIELD, Target
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.training.stages import require_text_channel
from nemo_mtbi.training.targets_check import check_targets, require_word_times
from tests.helpers import build
from tests.unit.targets_helpers import write_cuts

pytestmark = pytest.mark.unit


@pytest.fixture
def checked(tmp_path, tiny_config):
    def check(target=None, entry=None, section="train_ds", more=(), change=None, own=None, **imitation):
        config = copy.deepcopy(tiny_config)
        config["imitation"] = {**config.get("imitation", {}), "w_ctc": 0.0, **imitation}
        model = build(config)
        rendering = Target.rendering_of("chatml", "after", model.references["llm"])
        answer = Target("", "repeat", "repeat-01", "Repeat.", "yes", [300, 2], rendering=rendering).to_dict()
        answer |= own or {}
        cuts = list(CutSet.from_file(write_cuts(tmp_path / "cuts.jsonl", 2)))
        for cut in cuts:
            cut.custom = {TARGETS_FIELD: [answer, answer | (target or {})]}
        CutSet(cuts).to_file(tmp_path / "cuts.jsonl")
        if change is not None:
            change(tmp_path / "cuts.jsonl")
        entries = [*more, {"type": "mtbi", "cuts_path": str(tmp_path / "cuts.jsonl"), **(entry or {})}]
        data = {"train_ds": {"input_cfg": []}, "validation_ds": {"datasets": {"held_out": {"input_cfg": []}}}}
        (data[section] if section == "train_ds" else data[section]["datasets"]["held_out"])["input_cfg"] = entries
        check_targets(OmegaConf.create(data), model)

    return check


def test_what_fits_passes(checked):
    checked()
    checked({"rendering": ""})
    checked({"task": "my_own"}, {"tasks": {"my_own": 2.0}}, task_weights={"my_own": 0.5, "summary": 1.0})
    checked({"task": "summary", "rendering": "llama3/after/0"}, {"tasks": ["repeat"]})  # not drawn
    checked({"teacher_begin": 0}, teacher="cached", w_kl=0.0)
    checked({"task": "about", "rendering": "llama3/after/0"}, {"tasks": {"repeat": 1, "about": 0}})


@pytest.mark.parametrize("section", ["train_ds", "validation_ds"])
@pytest.mark.parametrize(
    ("target", "imitation", "message"),
    [
        ({"rendering": "llama3/after/0123456789ab"}, {}, "given under llama3/after"),
        ({"rendering": "chatml/after/another"}, {}, "given under chatml/after/another"),
        ({}, {"teacher": "cached"}, "has no teacher log-probabilities"),
    ],
)
def test_answers_that_do_not_fit(checked, target, imitation, message, section):
    with pytest.raises(DataError, match=message):
        checked(target, section=section, **imitation)


def test_what_looks_misspelled_is_said(checked, capsys):
    checked(None, {"tasks": ["repeat", "abouts"]}, task_weights={"repat": 0.5})
    said = "".join(capsys.readouterr())
    assert "tasks.abouts: did you mean about?" in said and "task_weights.repat: did you mean repeat?" in said


def test_empty_lines_are_passed_over_and_broken_ones_named(checked):
    checked(change=lambda file: file.write_text("\n" + file.read_text() + "\n"))
    with pytest.raises(DataError, match="line 3 is no JSON"):
        checked(change=lambda file: file.write_text(file.read_text() + "{half"))


def test_words_may_stand_in_tracks_or_elsewhere(checked, tmp_path):
    word = {"symbol": "yes", "start": 0.0, "duration": 0.5}
    timed = {"id": "mixed", "tracks": [{"cut": {"supervisions": [{"alignment": {"word": [word]}}]}}]}
    (tmp_path / "timed.jsonl").write_text(json.dumps(timed) + "\n")
    checked(more=[{"type": "mtbi", "cuts_path": str(tmp_path / "timed.jsonl")}], w_align=0.5)
    checked(more=[{"type": "mtbi", "shar_path": str(tmp_path)}], w_align=0.5)  # not looked at


def test_another_temperature(checked):
    stored = {"task": "about", "teacher_begin": 0, "teacher_temperature": 2.0}
    with pytest.raises(DataError, match="stored at temperature 2.0"):
        checked(stored, {"tasks": ["about"]}, teacher="cached")


@pytest.mark.parametrize(
    ("entry", "imitation", "message"),
    [
        ({"tasks": {"repeat": -1}}, {}, "below 0"),
        ({}, {"w_align": 0.5}, "needs word times"),
    ],
)
def test_settings_that_do_not_fit(checked, entry, imitation, message):
    with pytest.raises(ConfigError, match=message):
        checked(None, entry, **imitation)


def test_a_dense_connector_has_no_transcription_loss(checked, tiny_config):
    target = "nemo_mtbi.modules.connectors.StackMLPConnector"
    tiny_config["perception"] = {**tiny_config["perception"], "modality_adapter": {"_target_": target, "factor": 4}}
    with pytest.raises(ConfigError, match="w_ctc=0.3 needs a connector that emits tokens"):
        checked(w_ctc=0.3)


def test_the_alignment_stage_needs_word_times_too(tmp_path):
    data = {"train_ds": {"input_cfg": [{"type": "mtbi", "cuts_path": str(write_cuts(tmp_path / "cuts.jsonl", 2))}]}}
    require_word_times(OmegaConf.create(data), "alignment_stage.w_align", 0.0)
    with pytest.raises(ConfigError, match="model.alignment_stage.w_align=1.0 needs word times"):
        require_word_times(OmegaConf.create(data), "alignment_stage.w_align", 1.0)


def test_an_alignment_stage_without_a_term_is_refused(tiny_config):
    model = build(tiny_config)
    require_text_channel(model)
    model.config.alignment_stage.w_ctc = 0.0
    with pytest.raises(ConfigError, match="w_ctc and w_align are 0"):
        require_text_channel(model)


def test_answers_under_another_chat_template(checked, tmp_path, tiny_config):
    tiny_config["prompt_format"] = "chat_template"
    tokenizer = build(tiny_config).tokenizer.tokenizer
    rendering = Target.rendering_of(dialect("chat_template", tokenizer), "after", build(tiny_config).references["llm"])
    beside = tmp_path / "manifest.json"
    for found in ("[1]", json.dumps({"tokenizer": {"chat_template_digest": template_digest(tokenizer)}})):
        beside.write_text(found)
        checked({"rendering": rendering}, own={"rendering": rendering})
    beside.write_text(json.dumps({"tokenizer": {"chat_template_digest": "0" * 24}}))
    with pytest.raises(DataError, match="another chat template"):
        checked({"rendering": rendering}, own={"rendering": rendering})
