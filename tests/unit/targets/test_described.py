"""Described targets: the text LLM reads the voice, the student hears it."""

import dataclasses
import json
import re

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.utils import fastcopy

from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.description import DESCRIPTION_FIELD, Description
from nemo_mtbi.data.target import Target
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.evaluation.corpora import READERS
from nemo_mtbi.evaluation.questions import LabelledConfig
from nemo_mtbi.models.language_model import teacher_hidden_states
from nemo_mtbi.targets.config import DescriptionConfig
from nemo_mtbi.targets.decoder import Answer
from nemo_mtbi.targets.draw import PromptDrawer
from nemo_mtbi.targets.filters import Candidate, OneSided, misread, unasked
from nemo_mtbi.targets.generate import TargetGenerator
from nemo_mtbi.tasks.library import load_library
from nemo_mtbi.training.stages import require_acoustics
from tests.helpers import build
from tests.unit.data_helpers import conversations
from tests.unit.targets_helpers import config, write_cuts

pytestmark = pytest.mark.unit
TASKS = ["repeat", "voice_gender", "voice_description"]


def described_cuts(
    path, count, label=lambda i: {"gender": "female", "age": "child", "speaking rate": "fast"}, audio=False
):
    cuts = list(CutSet.from_file(write_cuts(path, count)))
    for i, cut in enumerate(cuts):
        if audio:
            file = path.parent / f"{cut.id}.wav"
            soundfile.write(file, np.random.default_rng(i).uniform(-0.5, 0.5, 16_000), 16_000)
            cut.recording = Recording.from_file(file)
        cut.supervisions[0].custom = {DESCRIPTION_FIELD: label(i)}
    CutSet(cuts).to_file(path)
    return str(path)


def described(tmp_path, llm, cuts, share=0.5, **changes):
    return config(tmp_path, llm, cuts, description=DescriptionConfig(share), **{"task_names": TASKS, **changes})


def test_the_text_llm_reads_descriptions_and_the_target_says_which(tmp_path, tiny_llm):
    drawer = PromptDrawer(described(tmp_path, tiny_llm, cuts := described_cuts(tmp_path / "cuts.jsonl", 24)))
    jobs = [
        job
        for cut in CutSet.from_file(cuts)
        for job in drawer.jobs(cut, "train", drawer.prepare([cut], "train", lambda requests: {}))
    ]
    decode = drawer.tokenizer.tokenizer.decode
    for job in jobs:
        read = decode(job.request.prompt_ids)
        assert (job.described.text if job.described else job.transcript) in read and job.transcript in read
        assert job.task == "repeat" or job.described
        assert job.task != "voice_gender" or "The gender is female." in job.described.text
    plain = [job for job in jobs if not job.described]
    assert {job.task for job in plain} == {"repeat"} and 4 <= len(plain) <= 20  # half of 24
    cuts = CutSet.from_file(TargetGenerator(described(tmp_path, tiny_llm, cuts)).run()["train"])
    targets = [Target(**t) for cut in cuts for t in cut.custom["targets"]]
    assert {t.task for t in targets} == set(TASKS)
    assert {t.described for t in targets} == {job.described.text if job.described else "" for job in jobs}


def test_cuts_without_the_attribute_go_without_the_task(tmp_path, tiny_llm):
    cuts = described_cuts(
        tmp_path / "cuts.jsonl", 4, lambda i: {"gender": "male"} if i == 0 else {"age": "adult"} if i == 1 else {}
    )
    folder = tmp_path / "targets"
    written = CutSet.from_file(TargetGenerator(described(tmp_path, tiny_llm, cuts)).run()["train"])
    tasks = [{t["task"] for t in cut.custom["targets"]} for cut in written]
    assert tasks == [set(TASKS), {"repeat", "voice_description"}, {"repeat"}, {"repeat"}]
    side = [json.loads(line) for line in (folder / "rejected" / "train.jsonl").read_text().splitlines()]
    assert [r["filter"] for r in side] == ["undescribed"] * 5 and "gender" in json.dumps(side[0])


def test_moments_are_compared_where_there_are_several(tmp_path, tiny_llm):
    cuts = list(CutSet.from_file(described_cuts(tmp_path / "cuts.jsonl", 2)))
    first, second = cuts[0].supervisions[0], fastcopy(cuts[0].supervisions[0], id="second", start=0.5, text="Good bye")
    second.custom = {DESCRIPTION_FIELD: {"gender": "male"}}
    first.duration = second.duration = 0.5
    cuts[0].supervisions = [second, first]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    settings = described(tmp_path, tiny_llm, str(tmp_path / "cuts.jsonl"), task_names=["repeat", "voice_comparison"])
    drawer = PromptDrawer(settings)
    assert [[t.name for t in drawer.tasks_of(cut, "train")].count("voice_comparison") for cut in cuts] == [1, 0]
    jobs = drawer.jobs(cuts[0], "train", drawer.prepare(cuts[:1], "train", lambda requests: {}))
    (read,) = [job.described.text for job in jobs if job.task == "voice_comparison"]
    times = re.findall(r"The transcript of a recording from (\S+) to (\S+):\n(.*)", read)
    assert times == [("00:00", "00:00", first.text), ("00:00", "00:01", "Good bye")]
    assert "The gender is male." in read.split("Good bye")[1]


def test_tasks_about_the_voice_need_descriptions(tmp_path, tiny_llm):
    cuts = described_cuts(tmp_path / "cuts.jsonl", 1)
    with pytest.raises(ConfigError, match="voice_gender asks about the voice, of which the text LLM reads nothing"):
        PromptDrawer(config(tmp_path, tiny_llm, cuts, task_names=TASKS))
    with pytest.raises(ConfigError, match=r"description.share=1.5: from 0 to 1"):
        TargetGenerator(described(tmp_path, tiny_llm, cuts, share=1.5))
    with pytest.raises(ConfigError, match="names colour"):
        PromptDrawer(config(tmp_path, tiny_llm, cuts, description=DescriptionConfig(0.5, "{{ text }} {{ colour }}")))
    assert not {t.name for t in PromptDrawer(config(tmp_path, tiny_llm, cuts, task_names=None)).tasks} & set(TASKS[1:])


FEMALE = Description("[00:00-00:03] hello (gender: female)", (("gender", "female"),))


def candidate(task, response, described=FEMALE):
    return Candidate(load_library()[task], "hello", response, [1], True, described=described)


@pytest.mark.parametrize(
    ("task", "response", "rejected"),
    [
        ("repeat", "hello", False),
        ("repeat", "hello (gender: female)", True),
        ("repeat", "A speaker of female gender says hello.", True),
        ("repeat", "It is about their age and gender.", True),
        ("repeat", "From 00:00 on: hello", True),
        ("voice_description", "gender: female", False),
    ],
)
def test_nobody_mentions_the_voice_unasked(task, response, rejected):
    assert (unasked(candidate(task, response)) is not None) == rejected
    assert unasked(candidate(task, response, None)) is None


@pytest.mark.parametrize(
    ("task", "response", "reason"),
    [
        ("voice_gender", "Female.", None),
        ("voice_gender", "Male", "says male, not female"),
        ("voice_gender", "Male or female", "says male, female, not female"),
        ("voice_gender", "A woman", "says none of the choices, not female"),
        ("voice_description", "A man speaks.", None),
        ("repeat", "male", None),
    ],
)
def test_answers_about_an_attribute_are_what_was_read(task, response, reason):
    assert misread(candidate(task, response)) == reason
    assert misread(candidate(task, response, None)) is None


@pytest.mark.parametrize(
    "response, reason",
    [
        ("Gender: Female, Age: child, Speaking rate: fast", None),
        ("A girl, female and a child, who speaks fast.", None),
        ("Gender: male, Age: children, Speaking rate: fast", "does not say gender female, age child"),
    ],
)
def test_an_answer_about_several_attributes_says_each(response, reason):
    about = Description("x", (("gender", "female"), ("age", "child"), ("speaking rate", "fast"), ("pitch", "low")))
    told = dataclasses.replace(candidate("voice_profile", response), described=about)
    assert misread(told) == reason


def test_tasks_with_words_of_their_own_are_not_misread():
    task = dataclasses.replace(load_library()["voice_gender"], choices=["Male", "Female"])
    told = dataclasses.replace(candidate("voice_gender", "FEMALE"), task=task)
    assert misread(told) is None and misread(dataclasses.replace(told, response="Male")) == "says male, not female"
    own = dataclasses.replace(told, task=dataclasses.replace(task, choices=["man", "woman"]), response="woman")
    assert misread(own) is None
    pitch = dataclasses.replace(load_library()["voice_pitch"], choices=["high", "very high"])
    high = Description("x", (("pitch", "very high"),))
    asked = dataclasses.replace(told, task=pitch, described=high, response="It is very high.")
    assert misread(asked) is None and misread(dataclasses.replace(asked, response="high")) is not None


def test_the_online_teacher_reads_the_description_and_the_student_does_not(tmp_path, tiny_llm, tiny_config):
    cuts = described_cuts(tmp_path / "cuts.jsonl", 3)
    path = TargetGenerator(described(tmp_path, tiny_llm, cuts, prompt_format="chat_template", share=1.0)).run()["train"]
    model = build({**tiny_config, "pretrained_llm": tiny_llm}, prompt_format="chat_template").eval()
    dataset = MTBIDataset(model.tokenizer, "chat_template")
    examples = [dataset._example(c) for c in conversations(path)]
    decode = model.tokenizer.tokenizer.decode
    for example in examples:
        assert "\nThe " not in decode(example.prompt_ids) and "\nThe " in decode(example.teacher_prompt)
        assert example.units[-1].token_end <= len(example.prompt_ids)
    batch = {"examples": examples}
    expected = teacher_hidden_states(
        model.llm, model.embed_tokens, [e.teacher_ids for e in examples], [e.response_ids for e in examples]
    )
    torch.testing.assert_close(model.teacher_hidden(batch), expected, rtol=1e-3, atol=1e-4)


def test_connectors_that_carry_words_alone_are_refused(tmp_path, tiny_llm, tiny_config):
    path = str(TargetGenerator(described(tmp_path, tiny_llm, described_cuts(tmp_path / "c.jsonl", 2))).run()["train"])
    names = ("WhisperDecoderConnector", "CTCCompressConnector", "TwoChannelConnector", "StackMLPConnector")
    for name in names:
        model = build(tiny_config).config
        model.perception["modality_adapter"] = {"_target_": f"nemo_mtbi.modules.connectors.{name}"}
        if name in names[:2]:
            with pytest.raises(ConfigError, match=f"Through {name} the LLM reads words alone"):
                require_acoustics(path, model)
        else:
            require_acoustics(path, model)
        require_acoustics(str(tmp_path / "c.jsonl"), model)  # no targets


def test_the_benchmark_asks_for_each_attribute_in_wordings_that_training_has_not(tmp_path):
    cuts = described_cuts(
        tmp_path / "c.jsonl", 3, lambda i: {"gender": ["male", "female", "x"][i], "accent": "odd"}, audio=True
    )
    questions = list(READERS["voice"](LabelledConfig("voice", cuts), tmp_path))
    assert [(q.task, q.label) for q in questions] == [("gender", "male"), ("gender", "female")]
    held_out = [p.text for p in load_library()["voice_gender"].select("held_out")]
    assert all(q.choices == ("male", "female") and "The gender is " in q.transcript for q in questions)
    assert all(any(q.prompt[:20] == text[:20] for text in held_out) for q in questions)
    plain = LabelledConfig("voice", cuts, prompts={"described": ""}, split="age, gender")
    assert ["gender" in q.transcript for q in READERS["voice"](plain, tmp_path)] == [False, False]
    assert not list(READERS["voice"](LabelledConfig("voice", cuts, split="age"), tmp_path))


def test_labels_are_balanced_and_parts_of_recordings_cut_out(tmp_path):
    genders = ["male"] * 5 + ["female"] * 2
    path = described_cuts(tmp_path / "c.jsonl", 7, lambda i: {"gender": genders[i]}, audio=True)
    config = LabelledConfig("voice", path, per_label=2)
    found = [q.label for q in READERS["voice"](config, tmp_path)]
    assert sorted(found) == ["female", "female", "male", "male"]
    assert [q.label for q in READERS["voice"](config, tmp_path)] == found
    cuts = [cut.truncate(offset=0.1, duration=0.4) for cut in CutSet.from_file(path)]
    CutSet.from_cuts(cuts).to_file(tmp_path / "parts.jsonl")
    questions = list(READERS["voice"](LabelledConfig("voice", str(tmp_path / "parts.jsonl")), tmp_path / "audio"))
    assert len({q.audio for q in questions}) == 7
    for question, cut in zip(questions, cuts, strict=True):
        samples, rate = soundfile.read(question.audio)
        assert len(samples) == pytest.approx(0.4 * rate, abs=1) and question.audio.parent == tmp_path / "audio"
        assert np.allclose(samples, cut.load_audio()[0], atol=1e-4)


@pytest.mark.parametrize(
    ("readings", "rejected"),
    [
        ({"male": [50, 50], "female": [50, 0]}, True),  # "male" whatever is read
        ({"male": [50, 26], "female": [50, 24]}, True),
        ({"male": [50, 40], "female": [50, 45]}, False),
        ({"male": [50, 50], "female": [50, 25]}, False),  # informedness 0.5
        ({"slow": [9, 9], "medium": [9, 9], "fast": [9, 0]}, False),
        ({"slow": [9, 9], "medium": [9, 4], "fast": [9, 0]}, True),
        ({"male": [50, 50], "female": [4, 0]}, False),  # too few to tell
        ({"male": [50, 0]}, False),
        ({}, False),
    ],
)
def test_wordings_that_are_answered_alike_whatever_the_voice_is(readings, rejected):
    task = load_library()["voice_gender"]
    reason = OneSided({"voice_gender/a": readings}).check(task, "a", "Male")
    assert (reason is not None) == rejected and (not rejected or "too seldom" in reason)
    assert OneSided({"voice_gender/a": readings}).check(task, "b", "Male") is None


class Listener:
    """A text LLM that reads the gender, if the question says "gender"; it says male, or what ``otherwise`` says of
    female voices, to other questions."""

    independent = True

    def __init__(self, tokenizer, end, otherwise):
        self.tokenizer, self.end, self.otherwise = tokenizer, end, otherwise

    def generate(self, requests, top_k=0, temperature=1.0):
        for request in requests:
            read = self.tokenizer.decode(request.prompt_ids)
            female, understood = "gender is female" in read, "gender" in read.replace("The gender is", "")
            said = ("Female" if understood else self.otherwise) if female else "Male"
            ids = [*self.tokenizer(said, add_special_tokens=False)["input_ids"], self.end]
            nothing = torch.zeros(len(ids), top_k)
            yield Answer(request.key, ids, True, nothing.int(), nothing.half())


@pytest.mark.parametrize(
    ("otherwise", "filters", "first"),
    [
        ("Male", ["misread", "one_sided"], "misread"),
        ("I cannot help with that.", ["refusal", "misread", "one_sided"], "refusal"),
        ("Male", ["one_sided"], None),
    ],
)
def test_answers_to_one_sided_wordings_are_rejected(tmp_path, tiny_llm, monkeypatch, otherwise, filters, first):
    cuts = described_cuts(tmp_path / "cuts.jsonl", 24, lambda i: {"gender": "female" if i % 2 else "male"})
    settings = described(tmp_path, tiny_llm, cuts, task_names=["voice_gender"], filters=filters, prompts_per_task=0)
    drawer = PromptDrawer(settings)
    listener = Listener(drawer.tokenizer.tokenizer, drawer.end_of_turn, otherwise)
    monkeypatch.setattr("nemo_mtbi.targets.shards.LazyEngine.get", lambda self: listener)
    written = CutSet.from_file(TargetGenerator(settings).run()["train"])
    targets = [Target(**t) for cut in written for t in cut.custom["targets"]]
    wordings = {p.id: p.text for p in load_library()["voice_gender"].select("seen")}
    fair = {name for name, text in wordings.items() if "gender" in text}
    assert {t.prompt_id for t in targets} == fair and len(targets) == 24 * len(fair)
    side = [json.loads(line) for line in (tmp_path / "targets/rejected/train.jsonl").read_text().splitlines()]
    lost = 12 * (len(wordings) - len(fair))
    counts = {first: lost, "one_sided": lost} if first else {"one_sided": 2 * lost}
    assert {name: sum(r["filter"] == name for r in side) for name in counts} == counts
    manifest = json.loads((tmp_path / "targets/manifest.json").read_text())
    assert manifest["targets"] == len(targets) and manifest["rejected"] == counts
