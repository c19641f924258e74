"""Packed rows against padded ones: the same states, gradients and steps."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models import gemma, llama, mistral, qwen2, qwen3

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models import language_model
from nemo_mtbi.models.language_model import PrefixStore, hidden_states, packs
from nemo_mtbi.models.packing import Packing, Prefix, know_packing, packable, packed_states
from tests.helpers import assert_same, build, gradients, make_batch

pytestmark = pytest.mark.unit
LENGTHS = [7, 3, 12, 1, 5]
BEGINNINGS = [[5, 6, 7], [5, 6, 7], [9], [8, 5, 6, 7, 4], [9]]
SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
FAMILIES = {
    "llama": llama.LlamaConfig,
    "qwen2": qwen2.Qwen2Config,
    "qwen3": qwen3.Qwen3Config,
    "mistral": mistral.MistralConfig,
    "gemma": gemma.GemmaConfig,
}


def random_llm(family="llama", **changes):
    torch.manual_seed(0)
    values = SHAPE | HEADS | ({"sliding_window": None} if family == "mistral" else {}) | changes
    return AutoModelForCausalLM.from_config(FAMILIES[family](**values)).eval().requires_grad_(False)


def states_and_gradient(llm, inputs, prefix, lengths):
    inputs = inputs.clone().requires_grad_()
    valid = torch.arange(inputs.shape[1]) < torch.tensor(LENGTHS)[:, None]
    states = hidden_states(llm, inputs, prefix, lengths)[valid]
    states.square().sum().backward()
    return states.detach(), inputs.grad[valid]


def given(llm):
    torch.manual_seed(1)
    inputs = torch.randn(len(LENGTHS), max(LENGTHS), SHAPE["hidden_size"])
    return inputs, PrefixStore(100).get(llm, llm.get_input_embeddings(), BEGINNINGS)


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_what_padded_rows_give(family):
    llm = random_llm(family)
    assert packable(llm)
    inputs, beginnings = given(llm)
    for prefix in (None, beginnings):
        for got, expected in zip(
            states_and_gradient(llm, inputs, prefix, LENGTHS),
            states_and_gradient(llm, inputs, prefix, None),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_every_layer_computes_the_valid_positions_alone():
    llm = random_llm()
    inputs, _ = given(llm)
    seen = []
    for layer in llm.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    hidden_states(llm, inputs, None, LENGTHS)
    assert seen == [(1, sum(LENGTHS), SHAPE["hidden_size"])] * 2


def varlen(module, query, key, value, mask, **kwargs):
    """What flash attention documents: row after row by cumulative lengths, causal from the last position backwards."""
    assert mask is None and query.shape[0] == 1
    repeat = query.shape[1] // key.shape[1]
    key, value = (state[0].repeat_interleave(repeat, 0) for state in (key, value))
    q, k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    assert q.dtype == k.dtype == torch.int32 and key.shape[1] == k[-1] and query.shape[2] == q[-1]
    assert (kwargs["max_length_q"], kwargs["max_length_k"]) == (int(q.diff().max()), int(k.diff().max()))
    rows = []
    for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
        scores = query[0, :, a:b] @ key[:, c:d].transpose(1, 2) * kwargs["scaling"]
        allowed = torch.ones(b - a, d - c).tril(int(d - c - (b - a))).bool()
        rows.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value[:, c:d])
    return torch.cat(rows, 1).transpose(0, 1)[None], None


@pytest.mark.parity
def test_flash_attention_gets_its_own_form(monkeypatch):
    """No GPU here: the lengths and keys that its kernels would get, computed as they document."""
    mapping = dict(type(ALL_ATTENTION_FUNCTIONS)._global_mapping)
    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "_global_mapping", mapping | {"flash_attention_3": varlen})
    llm = random_llm()
    inputs, beginnings = given(llm)
    for prefix in (None, beginnings):
        llm.config._attn_implementation = "sdpa"
        expected = states_and_gradient(llm, inputs, prefix, None)
        llm.config._attn_implementation = "flash_attention_3"
        for a, b in zip(states_and_gradient(llm, inputs, prefix, LENGTHS), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)  # gradients; CPUs round by up to 1.4e-5 here


def test_attention_without_a_plan_is_as_before():
    know_packing("sdpa")
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    know_packing("sdpa")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention  # not wrapped twice
    llm, ids = random_llm(), torch.randint(0, 60, (2, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    eager = random_llm(attn_implementation="eager")
    query = torch.randn(1, 4, 3, 8)
    by_name = attention(llm.model.layers[0].self_attn, query, query, query, attention_mask=None, scaling=1.0)
    assert by_name[0].shape == (1, 3, 4, 8)  # as some models call it
    torch.testing.assert_close(
        llm(ids, attention_mask=mask).logits[mask.bool()], eager(ids, attention_mask=mask).logits[mask.bool()]
    )


def test_an_llm_with_narrow_attention_is_not_packed():
    assert not packable(random_llm("mistral", sliding_window=4))
    assert not packable(random_llm("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1))
    assert not packable(random_llm(attn_implementation="eager"))
    assert packable(random_llm("qwen2", use_sliding_window=False, sliding_window=4))


@pytest.mark.parametrize("family", ["stablelm", "diffllama", "gemma2"])
def test_an_llm_that_cannot_be_packed_computes_padded_rows(family):
    """One keeps the arguments for itself, one rearranges values after they are kept, one has a sliding window."""
    heads = HEADS | {"num_key_value_heads": 2 if family == "diffllama" else 4}
    values = {k: v for k, v in (SHAPE | heads).items() if k != "head_dim" or family == "gemma2"}
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).eval()
    assert not packs(llm, llm.get_input_embeddings())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_found_out_on_two_short_rows(family):
    llm = random_llm(family)
    assert packs(llm, llm.get_input_embeddings())
    llm = random_llm(family).bfloat16()
    assert packs(llm, llm.get_input_embeddings())


def test_nothing_counts_as_the_same_as_nonsense(monkeypatch):
    llm = random_llm()
    assert packs(llm.double(), llm.get_input_embeddings())
    monkeypatch.setattr(language_model, "packed_states", lambda body, inputs, *_: torch.full_like(inputs, torch.nan))
    assert not packs(llm, llm.get_input_embeddings())


def test_a_model_that_keeps_its_arguments_for_itself_is_refused():
    llm = random_llm()
    inputs, _ = given(llm)
    layer = llm.model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda *args, packing, **kwargs: own(*args, **kwargs)
    with pytest.raises(ConfigError, match="Set model.packing=false"):
        packed_states(llm.model, inputs, LENGTHS)


def test_a_plan_is_made_on_the_host_and_says_where_everything_is():
    plan = Packing.plan([2, 3])
    assert plan.places.tolist() == [0, 1, 3, 4, 5] and plan.positions.tolist() == [0, 1, 0, 1, 2]
    assert plan.rows.tolist() == [[0, 1, 1], [2, 3, 4]]
    keys = torch.zeros(2, 1, 3, 4)
    prefix = Prefix([(keys, keys)], torch.tensor([3, 1]), [3, 1])
    masked = Packing.plan([2, 3], prefix=prefix)
    assert masked.positions.tolist() == [3, 4, 1, 2, 3] and masked.mask.shape == (2, 1, 3, 6)
    assert masked.mask[1, 0].int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    flash = Packing.plan([2, 3], prefix=prefix, flash=True)
    assert flash.keys.tolist() == [0, 1, 2, 6, 7, 5, 8, 9, 10] and flash.begins["cu_seq_lens_k"].tolist() == [0, 5, 9]


@pytest.mark.parity
@pytest.mark.parametrize("changes", [{}, {"prefix_cache_tokens": 0}, {"activation_checkpointing": True}])
def test_a_step_is_the_same(tiny_config, changes):
    """Student, online teacher, kept beginnings and recomputed activations."""
    padded, packed = build(tiny_config, packing=False, **changes), build(tiny_config, **changes)
    assert packed.packs and not padded.packs
    batch = make_batch(padded, 6)
    assert_same(gradients(packed, [batch]), gradients(padded, [batch]), 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(packed.teacher_hidden(batch), padded.teacher_hidden(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_a_step_in_bfloat16_is_as_near_to_float32_as_without(tiny_config):
    """As it is run: frozen parts in bfloat16 under autocast."""
    exact = build(tiny_config, packing=False)
    batch = make_batch(exact, 6)
    expected = gradients(exact, [batch])
    errors = []
    for packing in (False, True):
        model = build(tiny_config, packing=packing, llm_dtype="bfloat16")
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(model, [batch])
        errors.append(max(float((got[n] - g).norm() / g.norm()) for n, g in expected.items()))
    assert errors[1] < max(1.2 * errors[0], 0.02), errors
