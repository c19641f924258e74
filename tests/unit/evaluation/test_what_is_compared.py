"""What stands in a benchmark's columns: tasks and wordings that systems were not trained on, answers that ended."""

import json
import tarfile
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from omegaconf import OmegaConf

from nemo_mtbi.checkpoints.seen_record import SEEN, seen_prompts
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.evaluation.benchmark import Benchmark, seen_by
from nemo_mtbi.evaluation.benchmark_report import markdown, plot_confusions
from nemo_mtbi.evaluation.corpora import READERS
from nemo_mtbi.evaluation.labelled import LabelledConfig
from nemo_mtbi.evaluation.metrics import measures
from nemo_mtbi.evaluation.predictions import about
from nemo_mtbi.models.seen import SeenRecord
from nemo_mtbi.preparation.voice_measures import measure
from nemo_mtbi.tasks.library import comparable, load_library
from tests.unit.evaluation_helpers import TASKS, record
from tests.unit.preparation_helpers import tone

pytestmark = pytest.mark.unit


def run_of(folder, tasks, **more):
    folder.mkdir(parents=True)
    seen = {"tasks": {task: {prompt: {"examples": 1} for prompt in prompts} for task, prompts in tasks.items()}, **more}
    (folder / SEEN).write_text(json.dumps(seen))
    return folder


def test_what_a_run_was_trained_on_goes_with_it(tmp_path):
    run = run_of(tmp_path / "run", {"repeat": ["repeat-01"]}, earlier_tasks={"translation": ["translation-02"]})
    with tarfile.open(tmp_path / "m.nemo", "w:") as archive:
        archive.add(run / SEEN, arcname=f"./{SEEN}")
    for path in (run, tmp_path / "m.nemo"):
        assert seen_prompts(path) == {"repeat": {"repeat-01"}, "translation": {"translation-02"}}
    (tmp_path / "other.nemo").write_text("no archive")
    assert seen_prompts(tmp_path / "other.nemo") == seen_prompts(tmp_path / "nowhere") == {}
    later = SeenRecord()
    later.earlier = {"translation": ["translation-02"]}
    assert later.manifest(None)["earlier_tasks"] == later.earlier
    assert "earlier_tasks" not in SeenRecord().manifest(None)


def asking(monkeypatch, systems, trained=None, unseen=None):
    """A benchmark up to where it opens a model."""

    class Opened(Exception):
        pass

    def opened(self, spec):
        raise Opened

    monkeypatch.setattr(Benchmark, "_open", opened)
    monkeypatch.setattr("nemo_mtbi.evaluation.benchmark.check_names", lambda cfg: None)
    cfg = {"output_dir": ".", "task_folders": None, "systems": systems, "labelled": None, "cuts": {}}
    benchmark = Benchmark.__new__(Benchmark)
    with pytest.raises(Opened):
        Benchmark.__init__(benchmark, OmegaConf.create(cfg | {"trained_tasks": trained, "unseen_tasks": unseen}))
    return benchmark


def test_unseen_tasks_are_those_that_no_system_has_seen(tmp_path, monkeypatch):
    first = run_of(tmp_path / "a", {"repeat": ["repeat-01"], "transcription": ["t-1"], "voice_gender": ["v-1"]})
    second = run_of(tmp_path / "b", {"about": ["about-01"]}, earlier_tasks={"translation": ["translation-02"]})
    systems = {"a": str(first), "b": f"{second}@untrained", "other": "salm:nvidia/some"}
    assert seen_by(systems.values()).keys() == {"repeat", "transcription", "voice_gender", "about", "translation"}
    found = asking(monkeypatch, systems)
    assert found.trained == ["about", "repeat", "translation"] and "translation" not in found.unseen
    assert "translation" not in asking(monkeypatch, systems, ["repeat"]).unseen
    with pytest.raises(ConfigError, match="trained on translation"):
        asking(monkeypatch, systems, ["repeat"], ["translation", "title"])
    alone = run_of(tmp_path / "c", {"transcription": ["t-1"]})
    with pytest.raises(ConfigError, match="trained on transcription alone.*name trained_tasks"):
        asking(monkeypatch, {"c": str(alone)})


def test_held_out_wordings_that_were_trained_are_told(tmp_path, monkeypatch):
    held_out = load_library()["repeat"].select("held_out")[0].id
    found = asking(monkeypatch, {"a": str(run_of(tmp_path / "a", {"repeat": ["repeat-01", held_out]}))})
    assert found._seen_wordings() == [held_out]
    told = {"trained_tasks": ["repeat"], "unseen_tasks": ["title"], "resamples": 100, "seconds_to_first_token": {}}
    text = markdown([("a|b", [["system", "x|y"], ["s", "1"]])], told | {"seen_wordings": [held_out]}, "c", {})
    assert f"of the column of unseen prompts: {held_out}." in text and "x\\|y" in text


def test_tasks_that_can_be_compared():
    library = load_library()
    assert comparable(library, ["voice_gender", "transcription", "repeat", "nothing", "about"]) == ["about", "repeat"]


def test_an_answer_that_the_limit_cuts_off_has_no_word_errors():
    whole = record("repeat", "a b c d")
    assert "wer" in measures(whole, whole, TASKS["repeat"])
    assert not {"wer", "wer_to_text_llm"} & measures(whole | {"ended": False}, whole, TASKS["repeat"]).keys()


def test_the_language_is_the_manifests_of_now():
    spoken = [SupervisionSegment("s", "r", 0, 1, text="hallo", language="de", speaker="x")]
    conversation = SimpleNamespace(
        cut=SimpleNamespace(supervisions=spoken, custom={}),
        target=SimpleNamespace(task="repeat", prompt_id="repeat-01"),
    )
    assert about(conversation)["language"] == "de" and about(conversation)["speaker"] == "x"


def test_of_several_people_only_what_they_share_is_asked(tmp_path):
    recording = Recording.from_file(tone(tmp_path / "a.wav", 2.0), recording_id="r")

    def spoken(name, begin, **labels):
        own = {"description": labels}
        return SupervisionSegment(name, "r", begin, 1, text="hello there", speaker=name, custom=own)

    two = [spoken("x", 0, gender="male", age="adult"), spoken("y", 1, gender="female", age="adult")]
    CutSet([MonoCut("a", 0, 2, 0, recording=recording, supervisions=two)]).to_file(tmp_path / "cuts.jsonl")
    options = LabelledConfig("voice", str(tmp_path / "cuts.jsonl"))
    assert {q.task for q in READERS["voice"](options, tmp_path)} == {"age"}


def test_edges_of_words_are_no_background():
    """A recording gated to zeros between its words tells nothing about noise."""
    rate, rng = 16000, np.random.default_rng(0)
    samples, words = np.zeros(rate * 5, np.float32), []
    for i in range(10):
        begin = i * 0.5
        samples[int(begin * rate) : int((begin + 0.2) * rate)] = 0.1 * rng.standard_normal(int(0.2 * rate))
        words.append((begin, begin + 0.2))
    found = measure(samples, rate, words, "a b c d e f g h i j")
    assert "level_db" in found and "snr_db" not in found
    quiet = samples + 0.001 * rng.standard_normal(len(samples)).astype(np.float32)
    assert measure(quiet, rate, words, "a b c d e f g h i j")["snr_db"] == pytest.approx(40, abs=1)


def test_labels_that_look_like_formulas_are_drawn():
    with mpl.rc_context({"text.usetex": False}):
        confusion = {"$\\frac$": {"$\\frac$": 1, "_b": 0}, "_b": {"$\\frac$": 0, "_b": 1}}
        figure = plot_confusions({"_mine": {"tasks": {"a$b": {"confusion": confusion}}}})
        figure.canvas.draw()
