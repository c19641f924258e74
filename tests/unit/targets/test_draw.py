"""Which prompts a cut is asked."""

import json
import shutil

import pytest
from lhotse import CutSet

from nemo_mtbi import registration as registration
from nemo_mtbi.errors import DataError
from nemo_mtbi.io.text import language_code
from nemo_mtbi.targets.draw import one_line
from nemo_mtbi.targets.generate import TargetGenerator
from nemo_mtbi.tasks.library import load_library
from tests.unit.targets_helpers import config, write_cuts

pytestmark = pytest.mark.unit


def draw(generator, cuts):
    values = generator.drawer.prepare(cuts, "train", lambda requests: {})
    return [job for cut in cuts for job in generator.drawer.jobs(cut, "train", values)]


def test_drawing_tasks_and_prompts(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 40)
    drawn = config(tmp_path, tiny_llm, cuts, task_names=["repeat", "about", "title"], tasks_per_cut={"train": 1})
    generator = TargetGenerator(drawn)
    listed = list(CutSet.from_file(cuts))
    jobs = draw(generator, listed)
    assert len(jobs) == 40 and {j.task for j in jobs} == {"repeat", "about", "title"}
    assert len({j.prompt_id for j in jobs}) > 15
    half = TargetGenerator(config(tmp_path / "half", tiny_llm, cuts, tasks_per_cut={"train": 0.5}))
    assert 10 < len(draw(half, listed)) < 30
    again = TargetGenerator(drawn)
    assert jobs == draw(again, listed)


def test_silent_recordings_get_all_wordings(tmp_path, tiny_llm):
    """That of a task is drawn apart from the task."""
    path = write_cuts(tmp_path / "cuts.jsonl", 200)
    cuts = list(CutSet.from_file(path))
    for cut in cuts:
        cut.custom = {"no_speech": True}
    tasks = ["repeat", "about", "continuation"]
    generator = TargetGenerator(config(tmp_path, tiny_llm, path, task_names=tasks, tasks_per_cut={"train": 1}))
    asked = {job.prompt_id for cut in cuts for job in generator.drawer.jobs(cut, "train", {})}
    assert asked == {p.id for name in tasks for p in load_library()[name].select("seen", ["en"])}


def test_prepared_questions_fill_the_prompt(tmp_path, tiny_llm):
    cuts = write_cuts(tmp_path / "cuts.jsonl", 3)
    chosen = config(tmp_path, tiny_llm, cuts, task_names=["question_answering", "entailment"], prompts_per_task=2)
    written = TargetGenerator(chosen).run()["train"]
    for line in written.read_text().splitlines():
        targets = json.loads(line)["custom"]["targets"]
        assert {t["task"] for t in targets} <= {"question_answering", "entailment"} and targets
        assert all("{{" not in t["prompt"] and t["rendering"].startswith("chatml/after/") for t in targets)
    shutil.rmtree(chosen.output_dir)
    chosen.filters.append("truncated")  # the random LLM's questions do not end
    with pytest.raises(DataError, match="'prepare': 12"):
        TargetGenerator(chosen).run()
    assert one_line(' "Is it raining?"\nYes.') == "Is it raining?" and one_line("") == ""


@pytest.mark.parametrize("name, code", [("zh-CN", "zh"), ("zh_CN", "zh"), ("Chinese", "zh"), ("EN", "en"), ("x", "x")])
def test_languages_by_code_or_by_name(name, code):
    assert language_code(name) == code
