"""Systems behind one interface."""

import copy
import types

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.evaluation.benchmark import open_system
from nemo_mtbi.evaluation.predictions import Predictions, ways_of_writing
from nemo_mtbi.evaluation.systems import (
    SystemBatch,
    TextLLM,
    TextSystem,
    against_the_text_llm,
    decoded,
    log_likelihoods,
)
from nemo_mtbi.models import MTBISALM
from tests.helpers import build, make_batch
from tests.unit.nemo_helpers import ADAPTERS

pytestmark = pytest.mark.unit


def test_any_salm_is_a_system_of_the_benchmark(tiny_config, nemo_asr, tmp_path):
    """A stock SALM answers the benchmark's questions; an unreadable recording is left out."""
    from lhotse import CutSet

    from nemo_mtbi.data.target import TARGETS_FIELD, Target
    from nemo_mtbi.evaluation.systems import EvaluationSet, SALMSystem
    from nemo_mtbi.preparation.sources import utterance_cut

    config = {
        **copy.deepcopy(tiny_config),
        "pretrained_asr": nemo_asr,
        "perception": {"modality_adapter": ADAPTERS["nemo"]},
    }
    ours = MTBISALM(config).eval()
    system = SALMSystem(str(save_directory(ours, tmp_path / "hf")))
    target = Target("", "qa", "qa-0", "What is it?", "a tone", [300, 2]).to_dict()
    cuts = []
    for name in ("good", "bad"):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
        cuts.append(utterance_cut(name, tmp_path / f"{name}.wav", "beep", None, "en", {TARGETS_FIELD: [target]}))
    (tmp_path / "bad.wav").write_bytes(b"")
    questions = EvaluationSet(ours, CutSet.from_cuts(cuts), cached_features=False)
    predictions = Predictions(tmp_path / "salm", "key", lambda c: ["a", "b"], lambda c: 4, 2)
    (record,) = predictions.predict("set", ours, system, questions).values()
    assert record["utterance"] == "good" and isinstance(record["answer"], str)
    assert record["choice"] is None and "agreed" not in record


def test_teacher_forced_scores_equal_transformers_and_keep_ids_in_bfloat16(tiny_config):
    model = MTBISALM(copy.deepcopy(tiny_config)).eval()
    reading = SystemBatch([], make_batch(model, 2)["examples"], None)
    reading.inputs = [e.prompt_ids for e in reading.examples]
    system = TextSystem(model, None)
    responses = [[999, 1001, 2], [48_999, 2]]  # bfloat16 would round them
    with torch.no_grad():
        found = log_likelihoods(model, system, reading, responses)
        llm = AutoModelForCausalLM.from_pretrained(tiny_config["pretrained_llm"], dtype=torch.float32).eval()
        for value, example, response in zip(found, reading.examples, responses, strict=True):
            ids = torch.tensor([example.prompt_ids + response])
            log_probs = llm(ids).logits[0].log_softmax(-1)[len(example.prompt_ids) - 1 : -1]
            assert value == pytest.approx(float(log_probs.gather(1, torch.tensor(response)[:, None]).sum()), rel=1e-4)
        low = MTBISALM({**copy.deepcopy(tiny_config), "llm_dtype": "bfloat16"}).eval()
        assert log_likelihoods(low, TextSystem(low, None), reading, responses) == pytest.approx(found, rel=0.02)
        text_llm = TextLLM()
        forced, again = (against_the_text_llm(low, TextSystem(low, None), reading, text_llm) for _ in range(2))
    assert len(text_llm.kept) == 2 and forced == again  # the second system reads the states that were kept
    assert [f.tokens for f in forced] == [len(e.response_ids) for e in reading.examples]
    assert all(f.kl == pytest.approx(0, abs=1e-3) for f in forced)  # the topline against itself


def test_each_answer_has_a_budget_of_its_own(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [tokenizer.encode("one two three four")] * 2
    assert decoded(tokenizer, rows, [2, 9]) == ["one two", "one two three four"]


@torch.no_grad()
def test_a_choice_is_as_likely_as_its_ways_of_writing_together(tiny_config, monkeypatch):
    """Of "female", "Female" and "male": the sum of the first two decides, whichever alone is the likeliest."""
    model = MTBISALM(copy.deepcopy(tiny_config)).eval()
    batch = make_batch(model, 2)
    conversations = [types.SimpleNamespace(target=types.SimpleNamespace(task="x")) for _ in range(2)]
    reading = SystemBatch(conversations, batch["examples"], None)
    written = {"female": -1.0, "Female": -1.0, "male": -0.7, "Male": -9.0, "B": -0.1, "A": -0.2, "a": -9.0, "b": -9.0}
    tokenizer, asked = model.tokenizer.tokenizer, []

    def scored(model, system, reading, responses):
        assert all(ids[-1] == model.end_of_turn() for ids in responses)
        asked.append([tokenizer.decode(ids[:-1]) for ids in responses])
        return [written.get(text, 0.0) for text in asked[-1]]

    monkeypatch.setattr("nemo_mtbi.evaluation.predictions.log_likelihoods", scored)
    choices = iter([["male", "female"], ["A", "B"]])
    predictions = Predictions(None, "key", lambda conversation: next(choices), lambda c: 4, 2)
    assert predictions._choices(model, TextSystem(model, None), reading) == ["female", "B"]
    assert [first for first, _ in asked] == ["male", "Male", "female", "Female"]
    assert {second for _, second in asked} == {"A", "a", "B", "b"}


@pytest.mark.parametrize(
    ("choices", "ways"),
    [
        (["male"], {"male": ["male", "Male"]}),
        (["English", "german"], {"English": ["English", "english"], "german": ["german", "German"]}),
        (["yes", "no", "no"], {"yes": ["yes", "Yes"], "no": ["no", "No"]}),
        (["may", "May"], {"may": ["may"], "May": ["May"]}),
        (["3", "", "\u00e9t\u00e9"], {"3": ["3"], "": [""], "\u00e9t\u00e9": ["\u00e9t\u00e9", "\u00c9t\u00e9"]}),
        ([], {}),
    ],
)
def test_ways_of_writing(choices, ways):
    assert ways_of_writing(choices) == ways


def test_a_trained_llm_is_not_taken_for_the_text_llm(tiny_config, tmp_path):
    frozen = [r"^embed_tokens\..+$", r"^llm\.lm_head.+$"]
    model = build(tiny_config, freeze_params=frozen, imitation={"teacher": "cached"})
    RunDirectory(tmp_path).save_config(model, model.hparams["cfg"])
    RunDirectory(tmp_path).save_weights(model, "imitation")
    with pytest.raises(ConfigError, match=r"The LLM was trained itself \(llm\."):
        open_system(str(tmp_path), "float32")
