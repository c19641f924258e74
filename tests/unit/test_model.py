"""MTBISALM on tiny random parts: batches, objective, normalization, checkpoints, exports and bad input."""

import copy
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from nemo.collections.speechlm2.models.salm import SALM

from nemo_mtbi.data.dataset import Example
from nemo_mtbi.data.interleaving import Word, timeline
from nemo_mtbi.errors import CheckpointError, ConfigError, DataError
from nemo_mtbi.export.archive import load_nemo, save_directory, save_nemo
from nemo_mtbi.export.round_trip import max_abs_logit_difference
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.training.run_directory import RunDirectory

pytestmark = pytest.mark.unit
SECONDS = 1.2


def build(config, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return MTBISALM(config)


def make_batch(model, count, seed=0):
    """``count`` examples over noise, with prompts and answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        prompt = torch.randint(100, 4000, (9 + index % 3,), generator=generator).tolist()
        words = [Word(3 + i, 4 + i, 0.2 * i, 0.2 * i + 0.15) for i in range(4)]
        answer = [*torch.randint(100, 4000, (2 + index % 4,), generator=generator).tolist(), 2]
        examples.append(
            Example(
                f"utt{index}", 0, "repeat", f"p{index}", prompt, timeline(words, SECONDS), answer, SECONDS, "one two"
            )
        )
    audio = 0.1 * torch.randn(count, round(SECONDS * 16000), generator=generator)
    return {"examples": examples, "audios": audio, "audio_lens": torch.full((count,), audio.shape[1])}


def split(batch, sizes):
    parts, begin = [], 0
    for size in sizes:
        rows = slice(begin, begin + size)
        parts.append(
            {
                "examples": batch["examples"][rows],
                "audios": batch["audios"][rows],
                "audio_lens": batch["audio_lens"][rows],
            }
        )
        begin += size
    return parts


class OneStepTrainer:
    """What ``on_before_optimizer_step`` reads of Lightning's trainer."""

    def __init__(self, accumulate):
        self.accumulate_grad_batches = accumulate
        self.global_step = 0


def gradients(model, parts):
    """Connector gradients of one optimizer step over micro-batches, as Lightning would accumulate them."""
    model.zero_grad(set_to_none=True)
    model.log = model.log_dict = lambda *args, **kwargs: None
    model._trainer = OneStepTrainer(len(parts))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for part in parts:
        (model.training_step(part, 0)["loss"] / len(parts)).backward()
    model.on_before_optimizer_step(optimizer)
    model._trainer = None
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, tolerance=1e-4):
    """Every gradient within ``tolerance`` of the expected one's norm."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= tolerance * float(gradient.norm()), name


@pytest.mark.parity
@pytest.mark.parametrize("sizes", [[4, 4], [2, 6], [1] * 8])
def test_gradient_does_not_depend_on_how_a_batch_is_cut(tiny_config, sizes):
    model = build(tiny_config)
    batch = make_batch(model, 8)
    whole = gradients(model, [batch])
    cut = gradients(model, split(batch, sizes))
    assert_same(cut, whole)


@pytest.mark.parity
def test_ce_and_gradients_equal_nemo_salm(tiny_config):
    """CE alone, without interleaving: the same loss and gradients as NeMo's own SALM.training_step."""
    model = build(tiny_config, imitation={"w_kl": 0.0, "teacher": "none"}, interleaving={"probability": 0.0})
    batch = make_batch(model, 5)
    ours = gradients(model, [batch])
    pad, tag = 0, model.audio_locator_tag_id
    model.__class__.text_pad_id = property(lambda self: pad)
    ids, masks = [], []
    for e in batch["examples"]:
        row = e.prompt_ids[:3] + [tag] + e.prompt_ids[7:] + e.response_ids
        ids.append(torch.tensor(row))
        masks.append(torch.tensor([False] * (len(row) - len(e.response_ids)) + [True] * len(e.response_ids)))
    pad_left = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side="left")  # noqa: E731
    salm_batch = {**batch, "input_ids": pad_left(ids, pad), "loss_mask": pad_left(masks, False)}
    try:
        model.zero_grad(set_to_none=True)
        inputs = SALM.prepare_inputs(model, salm_batch)
        logits = SALM.forward(model, inputs["input_embeds"], inputs["attention_mask"])["logits"]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), inputs["target_ids"].flatten(), ignore_index=-100
        )
        loss.backward()
    finally:
        del model.__class__.text_pad_id
    assert_same(ours, {n: p.grad for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parity
def test_text_share_one_is_the_teacher(tiny_config):
    """Everything as text: the student reads what the teacher reads, so KL is zero and no speech position is used."""
    model = build(tiny_config, prefix_cache_tokens=0, interleaving={"probability": 1.0, "text_share": 1.0}).eval()
    batch = make_batch(model, 3)
    student = model.student(batch, interleave=True)
    loss = model.imitation(batch, student)
    assert abs(float(loss.kl)) < 1e-4
    texts = sum(len(e.prompt_ids) + len(e.response_ids) - 1 for e in batch["examples"])
    assert int(student.assembled.lengths.sum()) == texts == len(student.assembled.text_ids)


def test_cached_features_give_the_same_step(tiny_config):
    model = build(tiny_config)
    batch = make_batch(model, 3)
    features, lengths = model.encode(batch["audios"], batch["audio_lens"])
    cached = {"examples": batch["examples"], "encoder_features": features, "encoder_feature_lens": lengths}
    with_audio, with_cache = gradients(model, [batch]), gradients(model, [cached])
    assert_same(with_cache, with_audio)


@pytest.mark.parity
def test_cached_teacher_with_the_whole_vocabulary_equals_online(tiny_config):
    from nemo_mtbi.modules.language_model import teacher_hidden_states

    online = build(tiny_config, imitation={"temperature": 1.5})
    batch = make_batch(online, 3)
    examples = batch["examples"]
    hidden = teacher_hidden_states(
        online.llm, online.embed_tokens, [e.prompt_ids for e in examples], [e.response_ids for e in examples]
    )
    log_probs, ids = (online.head().logits(hidden) / 1.5).log_softmax(-1).sort(descending=True)
    cached = build(tiny_config, imitation={"temperature": 1.5, "teacher": "cached"})
    expected = gradients(online, [batch])
    got = gradients(cached, [{**batch, "teacher_ids": ids, "teacher_log_probs": log_probs}])
    assert_same(got, expected)


@pytest.mark.parity
def test_kept_prompt_beginnings_change_nothing(tiny_config):
    plain, kept = build(tiny_config, prefix_cache_tokens=0), build(tiny_config)
    batch = make_batch(plain, 5)
    assert plain.prefixes is None
    expected = gradients(plain, [batch])
    assert_same(gradients(kept, [batch]), expected)
    assert len(kept.prefixes.kept) == 5
    assert_same(gradients(kept, [batch]), expected)  # from the store now
    kept.prefixes.max_tokens = 4
    assert_same(gradients(kept, [batch]), expected)
    assert len(kept.prefixes.kept) == 1


def test_recomputed_activations_give_the_same_gradient_from_less_memory(tiny_config):
    plain, checkpointed = build(tiny_config, prefix_cache_tokens=0), build(tiny_config, activation_checkpointing=True)
    batch = make_batch(plain, 8)
    expected = gradients(plain, [batch])
    assert checkpointed.prefixes is None
    assert_same(gradients(checkpointed, [batch]), expected)
    kept = []
    for model in (plain, checkpointed):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.nbytes) or t, lambda t: t):
            model.training_step(batch, 0)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    assert not any(layer.training for layer in checkpointed.eval().llm.model.layers)


def test_fused_norms_compute_the_same(tiny_config):
    plain, fused = build(tiny_config), build(tiny_config, fused_norms=True)
    assert sum(isinstance(m, torch.nn.RMSNorm) for m in fused.llm.modules()) == 5
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in fused.named_parameters()}
    batch = make_batch(plain, 4)
    assert_same(gradients(fused, [batch]), gradients(plain, [batch]), 1e-5)


def test_waveform_interleaving_encodes_the_pieces(tiny_config):
    model = build(
        tiny_config, interleaving={"probability": 1.0, "text_share": 0.5, "span_words": 1, "level": "waveform"}
    )
    batch = make_batch(model, 4)
    student = model.student(batch, interleave=True)
    assert student.speech.embeddings.shape[0] >= 4 and torch.isfinite(student.hidden).all()
    with pytest.raises(ConfigError, match="waveform"):
        model.student({**batch, "encoder_features": torch.zeros(4, 5, 32)}, interleave=True)


def test_non_finite_gradients_skip_the_step_and_stop_in_the_end(tiny_config):
    model = build(tiny_config, max_bad_steps=1)
    batch = make_batch(model, 2)
    broken = {**batch, "audios": batch["audios"] * float("nan")}
    assert gradients(model, [broken]) == {}
    assert model.bad_steps == 1
    with pytest.raises(RuntimeError, match="non-finite"):
        gradients(model, [broken])


def test_only_the_connector_is_trained_and_checkpointed(tiny_config, tmp_path):
    model = build(tiny_config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(n.startswith("perception.modality_adapter.") for n in trained)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == trained
    run = RunDirectory(tmp_path)
    run.save_weights(model, "imitation")
    other = build(tiny_config)
    for parameter in other.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    run.load_weights(other, "imitation")
    for name in trained:
        torch.testing.assert_close(other.state_dict()[name], model.state_dict()[name])
    other.references = {**other.references, "llm": "another"}
    with pytest.raises(CheckpointError, match="another llm"):
        run.load_weights(other, "imitation")
    with pytest.raises(CheckpointError, match="another llm"):
        other.on_load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def exported(tiny_llm, tiny_whisper, tmp_path_factory):
    config = {
        "pretrained_llm": tiny_llm, "pretrained_asr": tiny_whisper, "prompt_format": "chatml", "llm_dtype": "bfloat16",
        "perception": {
            "input_length": "own",
            "modality_adapter": {
                "_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector", "vocab_size": 9, "d_model": 32, "heads": 4,
            },
        },
    }  # fmt: skip
    model = build(config)
    model.set_ctc_vocabulary(list(range(300, 309)))
    folder = tmp_path_factory.mktemp("export")
    return model, save_nemo(model, folder / "m.nemo"), save_directory(model, folder / "hf")


def test_exports_need_nothing_else_and_compute_the_same(exported):
    model, nemo, hf = exported
    for source in (nemo, hf):
        other = MTBISALM.restore_from(source)
        assert max_abs_logit_difference(model, other) < 1e-5
        assert other.perception.modality_adapter.vocabulary.token_ids == list(range(300, 309))
        assert other.encoder_key == model.encoder_key
    assert max_abs_logit_difference(model, MTBISALM.from_pretrained(str(hf))) < 1e-5
    assert not any(f.suffix in (".bin", ".pt", ".ckpt", ".pkl") for f in hf.rglob("*"))


def test_damaged_and_foreign_archives_are_refused(exported, tmp_path):
    _, nemo, hf = exported
    data = nemo.read_bytes()
    (tmp_path / "cut.nemo").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.nemo").write_text("hello")
    with tarfile.open(tmp_path / "asr.nemo", "w") as tar:
        tar.add(hf / "config.json", "model_config.yaml")
    for name, message in (
        ("cut", "damaged|truncated"),
        ("text", "damaged"),
        ("asr", "another kind"),
        ("none", "no file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_nemo(MTBISALM, tmp_path / f"{name}.nemo")
    with pytest.raises(CheckpointError, match="not empty"):
        save_directory(exported[0], hf)


@pytest.mark.parametrize("name", ["../escape.txt", "/tmp/escape_mtbi.txt", "link"])
def test_hostile_archives_write_nothing_outside(exported, tmp_path, name):
    _, nemo, _ = exported
    evil = tmp_path / "evil.nemo"
    with tarfile.open(nemo) as source, tarfile.open(evil, "w") as tar:
        for member in source.getmembers():
            tar.addfile(member, source.extractfile(member))
        info = tarfile.TarInfo(name)
        if name == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
        else:
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(CheckpointError, match="unsafe"):
        load_nemo(MTBISALM, evil)
    assert not (tmp_path / "escape.txt").exists()


def test_an_export_cannot_ask_for_remote_code(exported, tmp_path):
    import shutil

    shutil.copytree(exported[2], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "trust_remote_code": True}))
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        MTBISALM.restore_from(tmp_path / "hf")


@pytest.mark.parametrize("rate, channels", [(8000, 1), (22050, 2), (44100, 1), (48000, 2)])
def test_chat_takes_any_rate_and_channel_count(exported, tmp_path, rate, channels):
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((rate, channels)), rate)
    assert isinstance(exported[0].chat(path, "What?", max_new_tokens=3), str)


def test_bad_audio_and_dialogs_are_refused(exported, tmp_path):
    model = exported[0]
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", np.zeros(10), 16000)
    for name, message in (("absent", "There is no audio"), ("text", "cannot be read as audio"), ("short", "at least")):
        with pytest.raises(DataError, match=message):
            model.chat(tmp_path / f"{name}.wav", "What?")
    with pytest.raises(DataError, match="Write one tag for each audio"):
        model.generate([[{"role": "user", "content": "No tag."}]], torch.zeros(1, 16000), torch.tensor([16000]))


def test_generation_in_a_batch_equals_one_by_one(exported):
    model = exported[0].float()
    audio, lengths = 0.1 * torch.randn(3, 20000), torch.tensor([20000, 12000, 9000])
    prompts = [[model.user_turn(p)] for p in ("Repeat this.", "What is it about, in one sentence?", "Say it.")]
    together = model.generate(prompts, audio, lengths, max_new_tokens=6, do_sample=False)
    for row in range(3):
        own = audio[row : row + 1, : lengths[row]]
        alone = model.generate(prompts[row : row + 1], own, lengths[row : row + 1], max_new_tokens=6, do_sample=False)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"llm_dtpye": "float32"}, "llm_dtpye"),
        ({"llm_dtype": "int8"}, "llm_dtype"),
        ({"speech_position": "middle"}, "speech_position"),
        ({"imitation": {"teacher": "none", "w_kl": 1.0}}, "teacher=online or cached"),
        ({"imitation": {"divergence": "l2"}}, "divergence"),
        ({"interleaving": {"probability": 2}}, "interleaving"),
        ({"pretrained_llm": None}, "pretrained_llm"),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 2}, "sequence_parallel=true needs GPUs"),
    ],
)
def test_bad_configurations_are_refused_before_loading(tiny_config, change, message):
    with pytest.raises(ConfigError, match=message):
        MTBISALM({**tiny_config, "pretrained_asr": "/nowhere", **change})
