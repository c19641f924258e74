"""Measures, bootstrap and tables of the generalization benchmark."""

import copy
import importlib
import json

import numpy as np
import pytest
import sacrebleu
import soundfile
import torch
from hydra import compose, initialize_config_dir
from lhotse import Recording
from omegaconf import OmegaConf
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_mtbi.cli import CONF
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.evaluation.asr import WhisperASR
from nemo_mtbi.evaluation.benchmark import SEEN_PROMPTS, TOPLINE, summarize
from nemo_mtbi.evaluation.benchmark_report import TITLES, write_report
from nemo_mtbi.evaluation.labelled import label_measures, labelled_cuts
from nemo_mtbi.evaluation.metrics import filled_values, measures, word_errors
from nemo_mtbi.evaluation.statistics import Bootstrap, Sums
from nemo_mtbi.evaluation.systems import Reading, TextLLM, TextSystem, against_the_text_llm, log_likelihoods
from nemo_mtbi.examples.ablate import finished, subset, tasks_of, train_overrides
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.mtbi_salm import by_task
from nemo_mtbi.tasks.forms import choose
from nemo_mtbi.tasks.library import load_library
from tests.unit.test_model import make_batch

pytestmark = pytest.mark.unit
TASKS = load_library()


def record(task, answer, utterance="u", **more):
    return {
        "task": task,
        "prompt": "p",
        "answer": answer,
        "utterance": utterance,
        "transcript": "the cat sat",
        "language": "en",
        **more,
    }


def test_measures_of_each_kind_of_task():
    own = record("repeat", "The cat sat.")
    found = measures(record("repeat", "the bat sat down", tokens=8, agreed=6.0, kl=2.0), own, TASKS["repeat"])
    assert found["wer"] == found["wer_to_text_llm"] == (2.0, 3.0)
    assert found["token_agreement"] == (6.0, 8) and found["kl_per_token"] == (2.0, 8)
    assert found["rouge_l"][0] == pytest.approx(2 * 2 / (3 + 4))  # F of 2 common words among 3 and 4
    assert found["chrf"][0] == pytest.approx(sacrebleu.sentence_chrf("the bat sat down", ["The cat sat."]).score / 100)
    own = record("sentiment", "Positive.", choice="neutral")
    found = measures(record("sentiment", "It is positive", choice="positive"), own, TASKS["sentiment"])
    assert found["accuracy_text"] == (1.0, 1) and found["accuracy_likelihood"] == (0.0, 1) and found["form"] == (1.0, 1)
    assert "token_agreement" not in found and "wer" not in found
    found = measures(record("sentiment", "positive or negative"), own, TASKS["sentiment"])
    assert found["accuracy_text"] == (0.0, 1) and found["form"] == (0.0, 1) and "accuracy_likelihood" not in found
    assert "accuracy_text" not in measures(own, record("sentiment", "no idea"), TASKS["sentiment"])
    assert set(found) <= set(TITLES)


def test_the_language_that_a_prompt_asks_for_is_checked():
    task = TASKS["translation"]
    assert filled_values(task, "Say this in French.") == {"language": "French"}
    french = record("translation", "le chat est sur la table") | {"prompt": "Say this in French."}
    german = french | {"answer": "die Katze ist auf dem Tisch und nicht da"}
    assert measures(french, french, task)["form"] == (1.0, 1) and measures(german, french, task)["form"] == (0.0, 1)


def test_word_errors_are_counted_after_whispers_normalizer():
    assert word_errors("Mr. Smith won't pay twenty dollars", "mister smith will not pay $20") == (0.0, 6.0)
    assert word_errors("", "noise") == (0.0, 0.0)
    assert word_errors("Ärger im Büro", "ärger im büro!", "de-DE") == (0.0, 3.0)


def test_other_scripts_have_words_too():
    text = "Привет, мир"
    assert measures(record("repeat", text), record("repeat", text), TASKS["repeat"])["rouge_l"][0] == 1.0


def test_a_choice_inside_a_longer_one_counts_only_alone():
    drinks = ["coffee", "iced coffee", "mocha"]
    assert choose("An Iced coffee, please", drinks) == "iced coffee" and choose("coffee!", drinks) == "coffee"
    assert choose("coffee or iced coffee", drinks) is None and choose("tea", drinks) is None


def test_bootstrap_equals_scipy_and_pairs_utterances():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 30, 60)
    agreed = rng.binomial(tokens, 0.7)
    ids = [f"u{i:02d}" for i in range(60)]
    sums = Sums.of({i: (float(a), float(t)) for i, a, t in zip(ids, agreed, tokens, strict=True)})
    assert sums.value == pytest.approx(agreed.sum() / tokens.sum())
    bootstrap = Bootstrap(ids, 4000)
    low, high = bootstrap.interval(sums)
    reference = stats.bootstrap(
        (agreed, tokens), lambda a, t, axis: a.sum(axis) / t.sum(axis), paired=True, n_resamples=4000, method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.006)
    better = Sums(sums.ids, sums.values + [1, 0])  # better on every utterance
    test = bootstrap.compare(better, sums)
    assert test["difference"] == pytest.approx(60 / tokens.sum()) and test["low"] > 0 and test["p"] <= 1 / 2000
    assert bootstrap.compare(sums, sums)["p"] == 1.0
    assert Bootstrap(ids, 4000).interval(sums) == (low, high)  # the seed decides


def test_summary_and_report(tmp_path):
    def rows(agreed, answers):
        return {
            f"u{i}": record("repeat", a, f"u{i}", tokens=4, agreed=agreed[i], kl=4.0 - agreed[i])
            for i, a in enumerate(answers)
        }

    records = {
        TOPLINE: {SEEN_PROMPTS: rows([4.0] * 3, ["the cat sat"] * 3)},
        "cascade": {SEEN_PROMPTS: rows([2.0, 3.0, 2.0], ["the cat", "a cat sat", "cat"])},
        "ours": {SEEN_PROMPTS: rows([3.0, 4.0], ["the cat sat", "the cat sat"])},
    }
    summary = summarize(records, TASKS, "cascade", 200)
    ours = summary[SEEN_PROMPTS]["ours"]
    assert ours["scores"]["token_agreement"]["value"] == pytest.approx(7 / 8) and ours["missing"] == 1
    assert summary[SEEN_PROMPTS][TOPLINE]["scores"]["token_agreement"]["value"] == 1.0
    assert ours["against"]["token_agreement"]["difference"] == pytest.approx(7 / 8 - 5 / 8)  # where both answer
    assert "against" not in summary[SEEN_PROMPTS]["cascade"]
    about = {"trained_tasks": ["repeat"], "unseen_tasks": ["reply"], "systems": {}, "baseline": "cascade", "resamples": 200,
             "seconds_to_first_token": {"cascade": 0.5}}  # fmt: skip
    paths = write_report(tmp_path, {"held_out": summary}, about, "python x <y>")
    text = paths["md"].read_text()
    assert "| ours | 0.875 [" in text and "paired difference to cascade" in text and "jiwer 4" in text
    page = paths["html"].read_text()
    assert "data:image/png" in page and "python x &lt;y&gt;" in page and paths["png"].stat().st_size > 5000


@pytest.fixture
def labels(tmp_path):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * np.ones(8000), 16000)
    rows = [("a.wav", {"size": "small", "milkType": "soy milk"}), ("b.wav", {"size": "large"})]
    lines = ["path\tslots", *(f"{path}\t{json.dumps(slots)}" for path, slots in rows)]
    (tmp_path / "labels.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_slots_are_asked_with_the_values_of_the_whole_table(labels, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    cuts, transcribed = labelled_cuts(
        "coffee", {"kind": "slots", "path": str(labels / "labels.tsv"), "utterances": 1}, tokenizer, 2, labels
    )
    (cut,) = cuts
    size, milk = cut.custom["targets"]
    assert not transcribed and size["response"] == "small" and tokenizer.decode(size["response_ids"][:-1]) == "small"
    assert size["prompt"] == "Which size was ordered? Answer with one of these and nothing else: large, small."
    assert milk["prompt"].startswith("Which milk type was ordered?")
    label = cut.custom["labels"][size["prompt_id"]]
    assert (label["metric"], label["choices"]) == ("accuracy", ["large", "small"])
    row = {
        "reference": "small",
        "answer": "A small one.",
        "choice": "large",
        "choices": ["large", "small"],
        "metric": "accuracy",
        "language": "en",
    }
    found = label_measures(row)
    assert (found["accuracy_text"], found["accuracy_likelihood"]) == ((1.0, 1.0), (0.0, 1.0))
    assert label_measures({**row, "choices": [], "metric": "wer"})["wer"] == (2.0, 1.0)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"metric": "f1"}, "metrics are accuracy"),
        ({"metric": "accuracy"}, "accuracy needs choices"),
        ({"colour": "red"}, "line 1: TypeError"),
        ({"audio": "absent.wav"}, "no audio file"),
    ],
)
def test_bad_labels_name_the_line(labels, smollm2, row, message):
    file = labels / "q.jsonl"
    good = {"audio": "a.wav", "task": "qa", "prompt": "What?", "label": "it", "transcript": "what is it"}
    file.write_text(json.dumps(good | row) + "\n")
    with pytest.raises(DataError, match=message):
        labelled_cuts("qa", {"kind": "jsonl", "path": str(file)}, AutoTokenizer.from_pretrained(smollm2), 2, labels)
    file.write_text(json.dumps(good) + "\n")
    cuts, transcribed = labelled_cuts(
        "qa", {"kind": "jsonl", "path": str(file)}, AutoTokenizer.from_pretrained(smollm2), 2, labels
    )
    assert transcribed and next(iter(cuts)).supervisions[0].text == "what is it"


def test_teacher_forced_scores_equal_transformers_and_keep_ids_in_bfloat16(tiny_config):
    model = MTBISALM(copy.deepcopy(tiny_config)).eval()
    reading = Reading([], make_batch(model, 2)["examples"], None)
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


def test_sums_by_task_add_up(tiny_config):
    model = MTBISALM(copy.deepcopy(tiny_config)).eval()
    batch = make_batch(model, 4)
    student = model.student(batch, interleave=False)
    loss = model.imitation(batch, student)
    sums = torch.stack(list(by_task(batch["examples"], student.assembled, loss).values())).sum(0)
    assert sums.tolist() == pytest.approx([float(loss.loss), float(loss.agreed.sum()), len(loss.agreed)], rel=1e-4)


def test_ablation_variants_as_command_lines(tmp_path):
    targets = [{"id": f"c{i}", "custom": {"targets": [{"task": "repeat"}, {"task": "about"}]}} for i in range(200)]
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(t) + "\n" for t in targets))
    assert tasks_of(manifest) == {"repeat", "about"}
    half, quarter = (subset(manifest, tmp_path / "data", share) for share in (0.5, 0.25))
    assert set(quarter.read_text().splitlines()) < set(half.read_text().splitlines())
    assert 0.4 < len(half.read_text().splitlines()) / 200 < 0.6
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose(
            "ablate",
            [
                f"output_dir={tmp_path}",
                "warm_start=w@alignment",
                "cuts={a: b}",
                f"targets={{train: {manifest}, validation: v}}",
            ],
        )
        importlib.import_module("nemo_mtbi.examples.train")
        for name, variant in cfg.variants.items():
            overrides = train_overrides(cfg, OmegaConf.to_container(variant), tmp_path / name, 3)
            own = compose("train", overrides)
            assert (
                own.seed == 3
                and own.trainer.max_steps == 150
                and own.init_from == (None if name == "no_warm_start" else "w@alignment")
            )
            if name == "continuation_only":
                assert own.data.train_ds.input_cfg[0].tasks == ["continuation"]
            if name == "data_1_4":
                assert own.data.train_ds.input_cfg[0].cuts_path == str(quarter)
    run = tmp_path / "full"
    assert not finished(run, ["a=1"]) and not finished(run, ["a=1"])
    with pytest.raises(ConfigError, match="other settings"):
        finished(run, ["a=2"])


def test_the_cascade_leaves_unreadable_audio_out_and_hears_other_audio_anew(labels, tiny_whisper):
    cuts = [Recording.from_file(labels / f"{n}.wav").to_cut().with_id(n) for n in "ab"]
    (labels / "b.wav").write_text("broken")
    asr, cache = WhisperASR(str(tiny_whisper)), labels / "transcripts.jsonl"
    assert set(asr.transcribe(cuts, cache)) == {"a"}
    assert set(asr.transcribe(cuts, cache)) == {"a"} and len(cache.read_text().splitlines()) == 1
    soundfile.write(labels / "a.wav", 0.1 * np.ones(9000), 16000)
    asr.transcribe([Recording.from_file(labels / "a.wav").to_cut().with_id("a")], cache)
    assert len(cache.read_text().splitlines()) == 2
