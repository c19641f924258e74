"""Multi-task sampling, the batch contract, the feature cache and the CTC vocabulary."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from nemo.collections.common.tokenizers import AutoTokenizer
from omegaconf import OmegaConf

from nemo_mtbi import models as models
from nemo_mtbi.data.array_storage import RawChunkyReader, RawChunkyWriter
from nemo_mtbi.data.cache_features import cache_features
from nemo_mtbi.data.conversation import ConversationIterator, TargetSelection, read_mtbi
from nemo_mtbi.data.ctc_vocabulary import CTCVocabulary, choose_tokens, count_tokens
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.sources import utterance_cut
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.losses.alignment import ctc_loss, word_alignment_loss
from nemo_mtbi.models.encoder import FrozenEncoder
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.generate import TargetGenerator
from nemo_mtbi.targets.record import Target

pytestmark = pytest.mark.unit


def target(task, prompt, ids=(5, 6, 2), **kwargs):
    return Target(f"{task}{prompt}", task, f"{task}-{prompt}", f"Prompt {prompt}.", "answer", list(ids), **kwargs)


TARGETS = [target(task, i) for task in ("repeat", "about", "rewrite") for i in range(4)]


def draws(selection, visits=300, cut="cut"):
    return [selection.select(cut, TARGETS, v)[0] for v in range(visits)]


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
    assert len(TargetSelection(every_target=True).select("c", TARGETS, 0)) == 12
    assert TargetSelection({"sing": 1.0}).select("c", TARGETS, 0) == []


def test_task_weights_hold_across_cuts_with_one_task_each():
    selection = TargetSelection({"repeat": 4.0, "about": 1.0})
    counts: Counter[str] = Counter()
    for cut in range(200):
        own = [t for t in TARGETS if t.task == ("repeat" if cut % 2 else "about")]
        counts.update(t.task for visit in range(10) for t in selection.select(f"c{cut}", own, visit))
    assert counts["repeat"] == 1000 and counts["repeat"] / counts["about"] == pytest.approx(4.0, rel=0.2)


@pytest.fixture
def manifest(tmp_path):
    """Three utterances with targets; the second one's audio is broken afterwards."""
    cuts = []
    for i, seconds in enumerate((1.0, 1.5, 2.2)):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, 0.1 * np.random.default_rng(i).standard_normal(round(16000 * seconds)), 16000)
        cut = utterance_cut(
            f"utt{i}", path, "one two three", "s", "en", {"targets": [t.to_dict() for t in TARGETS[:2]]}
        )
        cuts.append(cut)
    CutSet(cuts).to_file(tmp_path / "cuts.jsonl")
    return tmp_path / "cuts.jsonl"


def conversations(manifest, **selection):
    config = OmegaConf.create({"audio_locator_tag": "<|audio|>", "force_finite": True})
    return list(ConversationIterator(CutSet.from_file(manifest), TargetSelection(**selection), config))


def test_batch_contract_and_a_broken_recording(manifest, smollm2, tmp_path):
    dataset = MTBIDataset(AutoTokenizer(smollm2, use_fast=True), "chatml")
    items = conversations(manifest)
    batch = dataset[CutSet(items)]
    assert batch["audios"].shape == (3, 35200) and batch["audio_lens"].tolist() == [16000, 24000, 35200]
    assert [e.transcript for e in batch["examples"]] == ["one two three"] * 3
    (tmp_path / "1.wav").write_text("no audio any more")
    batch = dataset[CutSet(items)]
    assert [e.id.split("/")[0] for e in batch["examples"]] == ["utt0", "utt2"] and batch["audios"].shape[0] == 2


def test_same_cut_with_several_targets_in_one_batch(manifest, smollm2):
    dataset = MTBIDataset(AutoTokenizer(smollm2, use_fast=True), "chatml")
    batch = dataset[CutSet(conversations(manifest, every_target=True))]
    assert len(batch["examples"]) == 6 == batch["audios"].shape[0]


def test_targets_as_shar_give_the_same_batches(manifest, tiny_llm, tmp_path):
    """Audio, targets and the teacher's top-k from Lhotse Shar as from the manifest; a broken recording stays out."""
    config = TargetsConfig(
        cuts={"train": str(manifest)}, output_dir=str(tmp_path / "targets"), llm=tiny_llm, dtype="float32",
        prompt_format="chatml", task_names=["repeat", "about"], filters=["empty"], max_new_tokens=6, top_k=4,
        shar_dir=str(tmp_path / "shar"), shar_size=2,
    )  # fmt: skip
    (tmp_path / "1.wav").write_text("no audio")
    written = TargetGenerator(config).run()["train"]

    def batch(**source):
        entry = {"every_target": True, "audio_locator_tag": "<|audio|>", "force_finite": True, **source}
        items = list(read_mtbi(OmegaConf.create(entry))[0])
        dataset = MTBIDataset(AutoTokenizer(tiny_llm, use_fast=True), "chatml", teacher_temperature=1.0)
        return dataset[CutSet(sorted(items, key=lambda c: c.id))]

    from_manifest, from_shar = batch(cuts_path=str(written)), batch(shar_path=str(tmp_path / "shar" / "train"))
    assert [e.id for e in from_shar["examples"]] == [e.id for e in from_manifest["examples"]]
    assert len(from_shar["examples"]) == 4
    for key in ("audio_lens", "teacher_ids", "teacher_log_probs"):
        assert torch.equal(from_shar[key], from_manifest[key]), key
    assert torch.allclose(from_shar["audios"], from_manifest["audios"], atol=1e-4)


def encoder_config(tiny_config, **perception):
    config = {k: v for k, v in tiny_config.items() if k != "imitation"}
    return OmegaConf.create({**config, "perception": {**config["perception"], **perception}})


def test_cached_features_are_the_encoders_and_only_its(manifest, tiny_config, smollm2, tmp_path):
    encoder = FrozenEncoder(encoder_config(tiny_config))
    report = cache_features(encoder, manifest)
    assert (report.encoded, report.cached, report.skipped) == (3, 0, 0) and report.bytes > 0
    again = cache_features(encoder, manifest)
    assert (again.encoded, again.cached) == (0, 3)
    tokenizer = AutoTokenizer(smollm2, use_fast=True)
    batch = MTBIDataset(tokenizer, "chatml", cached_features=True, encoder_key=encoder.key)[
        CutSet(conversations(manifest))
    ]
    assert batch["encoder_features"].dtype == torch.bfloat16
    audio = MTBIDataset(tokenizer, "chatml")[CutSet(conversations(manifest))]
    expected, lengths = encoder.encode(audio["audios"], audio["audio_lens"])
    assert batch["encoder_feature_lens"].tolist() == lengths.tolist()
    torch.testing.assert_close(batch["encoder_features"].float(), expected.bfloat16().float())
    other = FrozenEncoder(encoder_config(tiny_config, round_seconds=3.0))
    assert other.key != encoder.key
    with pytest.raises(DataError, match="another encoder or input length"):
        MTBIDataset(tokenizer, "chatml", cached_features=True, encoder_key=other.key)[CutSet(conversations(manifest))]
    assert cache_features(other, manifest).encoded == 3
    soundfile.write(tmp_path / "0.wav", 0.1 * np.ones(16000), 16000)  # changed audio is encoded again
    assert cache_features(other, manifest).encoded == 1
    (tmp_path / "2.wav").write_text("broken")
    assert cache_features(encoder, manifest).skipped == 1


def test_cache_refuses_features_that_change(tiny_config):
    augment = {"_target_": "nemo.collections.asr.modules.SpectrogramAugmentation", "freq_masks": 1, "time_masks": 1}
    with pytest.raises(ConfigError, match="spec_augment"):
        FrozenEncoder(encoder_config(tiny_config, spec_augment=augment))
    config = encoder_config(tiny_config)
    config.prevent_freeze_params = [r"^perception\.encoder.+$"]
    with pytest.raises(ConfigError, match="the encoder is trained"):
        FrozenEncoder(config)


def test_teacher_of_another_temperature_or_length_is_refused(manifest, smollm2, tmp_path):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    writer = RawChunkyWriter(tmp_path / "t.bin")
    for row in rows:
        row["custom"]["targets"] = [target("repeat", 1, teacher_begin=0, teacher_temperature=1.0).to_dict()]
        for name, value in (
            ("teacher_ids", np.zeros((2, 4), np.int32)),
            ("teacher_log_probs", np.zeros((2, 4), np.float16)),
        ):
            row["custom"][name] = writer.store_array("", value).to_dict()
    writer.close()
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = AutoTokenizer(smollm2, use_fast=True)
    with pytest.raises(DataError, match="stored at temperature 1.0"):
        MTBIDataset(tokenizer, "chatml", teacher_temperature=2.0)[CutSet(conversations(manifest))]
    with pytest.raises(DataError, match=r"utt0/.*\(2 rows\) belong to another answer than its 3"):
        MTBIDataset(tokenizer, "chatml", teacher_temperature=1.0)[CutSet(conversations(manifest))]


def test_answers_given_under_another_rendering_are_refused(manifest, smollm2):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["custom"]["targets"] = [target("repeat", 1, rendering="llama3/after/abc").to_dict()]
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match="given under llama3/after/abc.*this model has chatml/after/def"):
        MTBIDataset(AutoTokenizer(smollm2, use_fast=True), "chatml", llm_key="def")[CutSet(conversations(manifest))]


def test_reader_of_input_cfg(manifest):
    config = OmegaConf.create({"type": "mtbi", "cuts_path": str(manifest), "audio_locator_tag": "<|audio|>", "tasks": ["repeat"],
                               "force_finite": False, "shuffle": False, "shard_seed": 0})  # fmt: skip
    cuts, tarred = read_mtbi(config)
    stream = iter(cuts)
    visits = [next(stream).visit for _ in range(7)]
    assert visits == [0, 0, 0, 1, 1, 1, 2] and not tarred
    with pytest.raises(ConfigError, match="needs cuts_path or shar_path"):
        read_mtbi(OmegaConf.create({"type": "mtbi"}))
    with pytest.raises(DataError, match="No cut has a target for the requested tasks"):
        config.tasks = ["sing"]
        next(iter(read_mtbi(config)[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_array_storage_keeps_the_bits(tmp_path, dtype):
    values = [torch.arange(12).reshape(3, 4).to(dtype), torch.ones(2, 2).to(dtype)]
    with RawChunkyWriter(tmp_path / "a.bin") as writer:
        keys = [writer.write("", v) for v in values]
    with RawChunkyWriter(tmp_path / "a.bin") as writer:  # appends
        keys.append(writer.write("", values[0]))
    reader = RawChunkyReader(tmp_path / "a.bin")
    for key, value in zip(keys, [*values, values[0]], strict=True):
        got = torch.from_numpy(reader.read(key))
        assert torch.equal(got.view(torch.bfloat16) if dtype == torch.bfloat16 else got, value)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-4])
    with pytest.raises(OSError, match="truncated"):
        reader.read(keys[-1])


def test_ctc_vocabulary_spells_what_it_does_not_hold(smollm2):
    tokenizer = AutoTokenizer(smollm2, use_fast=True).tokenizer
    texts = ["the cat sat on the mat", "the cat ate", "a zebra"]
    counts = count_tokens(texts, tokenizer)
    small = CTCVocabulary(choose_tokens(counts, tokenizer, max_size=20, min_count=2), tokenizer)
    for text in texts:
        assert small.decode(small.encode(text)) == text  # rare words by their letters
    full = CTCVocabulary(choose_tokens(counts, tokenizer, 10_000, 1), tokenizer)
    assert len(full.encode(texts[0])) == len(tokenizer(texts[0])["input_ids"]) < len(small.encode(texts[2])) + 6
    with pytest.raises(DataError, match="no transcript"):
        choose_tokens(count_tokens([], tokenizer), tokenizer, 10, 1)


def test_alignment_losses():
    log_probs = torch.full((1, 5, 4), -10.0)
    log_probs[0, range(5), [1, 1, 0, 2, 3]] = 0.0
    good, count = ctc_loss(log_probs.log_softmax(-1), torch.tensor([5]), [[1, 2, 3]])
    bad, _ = ctc_loss(log_probs.log_softmax(-1), torch.tensor([5]), [[3, 2, 1]])
    assert count == 3 and float(good) < 0.1 < float(bad)
    impossible, _ = ctc_loss(log_probs.log_softmax(-1), torch.tensor([5]), [[1] * 9])
    assert float(impossible) == 0
    text = torch.randn(6, 8)
    assert float(word_alignment_loss(text, text, 1.0)) == 0
    whole = float(word_alignment_loss(torch.zeros(6, 8), text, 0.5))
    parts = sum(float(word_alignment_loss(torch.zeros(3, 8), t, 0.5)) for t in text.split(3))
    assert whole == pytest.approx(parts) == pytest.approx(float(text.square().mean(-1).sum()) / 0.5)


def test_another_apex_is_not_taken_for_nvidias(tmp_path, monkeypatch):
    from nemo_mtbi.training.accelerators import fused_optimizer, nvidia_apex

    nvidia_apex.cache_clear()
    assert not nvidia_apex()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    nvidia_apex.cache_clear()
    assert not nvidia_apex()
    (tmp_path / "amp_C.py").write_text("")
    nvidia_apex.cache_clear()
    assert nvidia_apex()
    nvidia_apex.cache_clear()
    adam = OmegaConf.create({"_target_": "torch.optim.AdamW", "lr": 1.0})
    assert fused_optimizer(adam, "32-true") == adam  # no CUDA here
