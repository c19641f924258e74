"""One step of MTBISALM on tiny random parts: batches, objective, normalization, what is trained."""

import pytest
import torch
from nemo.collections.speechlm2.models.salm import SALM
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.training.stages import require_fine_types
from tests.helpers import assert_same, build, gradients, make_batch, split

pytestmark = pytest.mark.unit


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
    assert int(student.layout.lengths.sum()) == texts == len(student.layout.text_ids)


def test_cached_features_give_the_same_step(tiny_config):
    model = build(tiny_config)
    batch = make_batch(model, 3)
    features, lengths = model.encode(batch["audios"], batch["audio_lens"])
    cached = {"examples": batch["examples"], "encoder_features": features, "encoder_feature_lens": lengths}
    with_audio, with_cache = gradients(model, [batch]), gradients(model, [cached])
    assert_same(with_cache, with_audio)


@pytest.mark.parity
def test_cached_teacher_with_the_whole_vocabulary_equals_online(tiny_config):
    from nemo_mtbi.models.language_model import teacher_hidden_states

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


@torch.no_grad()
def test_kept_beginnings_take_few_kernels_whatever_the_batch(tiny_config):
    model = build(tiny_config)

    class Counted(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += not function.is_view
            return function(*args, **(kwargs or {}))

    rows = [[300 + n] * (3 + n % 4) for n in range(4)]
    model.prefixes.get(model.llm, model.embed_tokens, rows)
    counts = []
    for batch in (rows, rows * 8):
        with Counted() as counted:
            prefix = model.prefixes.get(model.llm, model.embed_tokens, batch)
        counts.append(counted.calls)
    assert counts[0] == counts[1] <= 16  # 4 different beginnings
    assert prefix.lengths.tolist() == [len(row) for row in rows] * 8


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
    assert student.spoken.embeddings.embeddings.shape[0] >= 4 and torch.isfinite(student.hidden).all()
    with pytest.raises(ConfigError, match="waveform"):
        model.student({**batch, "encoder_features": torch.zeros(4, 5, 32)}, interleave=True)


def test_non_finite_gradients_skip_the_step_and_stop_in_the_end(tiny_config):
    model = build(tiny_config, max_bad_steps=1)
    batch = make_batch(model, 2)
    broken = {**batch, "audios": batch["audios"] * float("nan")}
    assert gradients(model, [broken]) == {}
    assert model.bad_steps == 1
    assert gradients(model, [broken], scale=2.0) == {} and model.bad_steps == 1  # float16's scaler steps back
    with pytest.raises(RuntimeError, match="non-finite"):
        gradients(model, [broken], scale=1.0)  # it cannot any further


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


@pytest.mark.parametrize(("keep", "expected"), [("best", 1.0), ("last", 2.0)])
def test_the_next_stage_begins_where_another_process_would(tiny_config, tmp_path, keep, expected):
    model, run = build(tiny_config), RunDirectory(tmp_path)
    weight = next(p for p in model.parameters() if p.requires_grad)
    torch.nn.init.constant_(weight, 1.0)
    run.save_weights(model, "alignment", run.best_weights("alignment"))
    torch.nn.init.constant_(weight, 2.0)
    run.finish_stage(model, "alignment", keep)
    assert float(weight.min()) == float(weight.max()) == expected
    other = build(tiny_config)
    run.load_weights(other, "alignment")
    assert torch.equal(next(p for p in other.parameters() if p.requires_grad), weight)


def test_statistics_of_a_trained_encoder_are_kept(tiny_config, nemo_asr):
    adapter = {"_target_": "nemo_mtbi.modules.connectors.StackMLPConnector", "factor": 2, "hidden_dim": 8}
    frozen = [r"^llm\..+$", r"^embed_tokens\..+$"]
    config = tiny_config | {"pretrained_asr": nemo_asr, "perception": {"modality_adapter": adapter}}
    model = build(config, freeze_params=frozen, encoder_dtype="float32")
    kept = [name for name in model.trained_state() if name.endswith("running_mean")]
    norms = [m for m in model.perception.encoder.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert len(kept) == len(norms) > 0
    norms[0].running_mean.fill_(3.0)
    other = build(config, freeze_params=frozen, encoder_dtype="float32")
    other.load_trained_state(model.trained_state())
    assert float(other.state_dict()[kept[0]].min()) == 3.0
    assert not any("running_mean" in name for name in build(config).trained_state())
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert set(kept) <= checkpoint["state_dict"].keys()


@pytest.mark.parametrize(
    ("frozen", "key"),
    [(["perception.encoder"], "llm_dtype"), (["llm", "embed_tokens"], "encoder_dtype")],
)
def test_weights_are_not_trained_in_bfloat16(tiny_config, frozen, key):
    frozen = [rf"^{name}\..+$" for name in frozen]
    changes = {"freeze_params": frozen, key: "bfloat16", "imitation": {"teacher": "cached"}}
    with pytest.raises(ConfigError, match=f"Set model.{key}=float32"):
        require_fine_types(build(tiny_config, **changes))  # which opens: it may be a run of before, to be evaluated
    require_fine_types(build(tiny_config, **changes | {key: "float32"}))


def test_kept_prompt_beginnings_follow_the_model_to_another_type(tiny_config):
    """As to another device: what was kept for the old one is computed anew."""
    model = build(tiny_config)
    batch = make_batch(model, 2)
    model.student(batch, interleave=False)
    model.llm.to(torch.float64)
    model.embed_tokens.to(torch.float64)
    assert model.student(batch, interleave=False).hidden.dtype == torch.float64
    assert all(states.dtype == torch.float64 for states in model.prefixes.kept.values())


def test_two_names_of_one_tensor_are_frozen_together(tiny_config):
    frozen = [r"^llm\..+$", r"^perception\.encoder.+$"]
    with pytest.raises(ConfigError, match=r"freezes only some of llm.lm_head.weight, embed_tokens.weight"):
        build(tiny_config, freeze_params=frozen, imitation={"teacher": "cached"})


def test_a_connector_of_tokens_needs_embeddings_that_stay(tiny_config):
    """It has read them once: what is saved would not be what was trained."""
    config = tiny_config | {"freeze_params": [r"^perception\.encoder.+$"], "imitation": {"teacher": "cached"}}
    connector = {"_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector", "vocab_size": 5}
    config["perception"] = config["perception"] | {"modality_adapter": connector}
    with pytest.raises(ConfigError, match="leaves embed_tokens trainable"):
        build(config)


def test_the_online_teacher_reads_without_dropout(tiny_config):
    lora = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": ["q_proj"]}
    model = build(tiny_config, lora=lora)
    model.train()
    model.llm.base_model.model.model.layers[0].self_attn.attention_dropout = 0.5
    batch = make_batch(model, 2)
    assert torch.equal(model.teacher_hidden(batch), model.teacher_hidden(batch))
    assert model.llm.training


def test_an_encoder_that_was_trained_is_used_without_a_graph(tiny_config):
    frozen = [r"^llm\..+$", r"^embed_tokens\..+$"]
    model = build(tiny_config, freeze_params=frozen, encoder_dtype="float32").eval()
    audio, lengths = torch.randn(1, 8000), torch.tensor([8000])
    with torch.no_grad():
        assert not model.encode(audio, lengths)[0].requires_grad
    assert model.encode(audio, lengths)[0].requires_grad


def test_no_answer_of_its_own_to_silence_is_a_setting_that_stays(tiny_config):
    model = build(tiny_config, nothing_heard_answer=None)
    assert model.config.nothing_heard_answer is None and model.cfg.nothing_heard_answer is None
    assert build(tiny_config).config.nothing_heard_answer is not None
