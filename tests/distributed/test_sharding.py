"""Sharded LLMs (Megatron-Core layers, gloo) against the whole model.

Hidden states, loss, input gradients, greedy text.
"""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.imitation import ImitationObjective, imitation_loss
from nemo_mtbi.models.language_model import hidden_states
from nemo_mtbi.models.objective import embedding_energy
from nemo_mtbi.modules.causal_lm import checkpoint_activations, output_head
from nemo_mtbi.parallel.launch import initialize
from nemo_mtbi.parallel.loading import empty_llm, load_shards, local_snapshot
from nemo_mtbi.parallel.parts import gradient_norm, part_of, reduce_gradients
from nemo_mtbi.parallel.plan import pretended_ranks
from nemo_mtbi.parallel.sharding import check_divisible, shard_llm
from tests.launching import on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.parity]
V = 131  # no multiple of 2 or 4: padded
SIZE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
    attn_implementation="eager",
)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": False}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {"tie_word_embeddings": False}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"tie_word_embeddings": False}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 20.0, "query_pre_attn_scalar": 8}),
}
WHOLE_ATTENTION = "olmo2"  # its norms see all heads
LORA = {2: ("llama", "qwen3", "phi3"), 4: ("llama",)}  # at 4, two ranks share a key/value head


def build(name):
    torch.manual_seed(0)
    model, config, extra = MODELS[name]
    llm = model(config(**{**SIZE, **extra})).eval().requires_grad_(False)
    for parameter in llm.parameters():  # biases and norms that do something
        parameter.add_(0.05 * torch.randn_like(parameter))
    return llm


def measure(llm, shard=None):
    g = torch.Generator().manual_seed(1)
    embeds = (0.5 * torch.randn(2, 9, 32, generator=g)).requires_grad_()
    ids = torch.randint(3, V, (6,), generator=g)
    hidden = hidden_states(llm, embeds)
    rows = hidden.flatten(0, 1)[[3, 4, 5, 12, 13, 14]]
    kwargs = {} if shard is None else {"shard": shard}
    head = output_head(llm, **kwargs)
    loss = imitation_loss(rows, head, ids, ImitationObjective(), teacher_hidden=rows.detach().roll(1, 0))
    loss.loss.backward()
    prompt = torch.randint(3, V, (1, 5), generator=g)
    text = llm.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    return hidden.detach(), loss.loss.detach(), embeds.grad, text


def with_lora(name):
    """With adapters on every projection that do something."""
    llm = build(name)
    targets = {
        n.rpartition(".")[2] for n, m in llm.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }
    llm = get_peft_model(llm, LoraConfig(r=3, lora_alpha=6, target_modules=sorted(targets)))
    g = torch.Generator().manual_seed(2)
    for parameter in lora(llm).values():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return llm


def lora(llm):
    return {n: p for n, p in llm.named_parameters() if "lora_" in n}


def measure_lora(name, shard_it=False, sequence_parallel=False):
    """Hidden states etc., whole gradients of the adapters, and their norm."""
    llm, shard, group = with_lora(name), None, None
    if shard_it:
        shard = shard_llm(llm, sequence_parallel)
        group = shard.group
    values = measure(llm, shard)
    parameters = list(lora(llm).values())
    if shard_it:
        reduce_gradients(parameters, group, 0)
    gradients = {n: p.grad if part_of(p) is None else part_of(p).whole(p.grad, group) for n, p in lora(llm).items()}
    return values, gradients, gradient_norm(parameters, group)


def join(rank, size, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    initialize(size)


def recomputed_gradient(sequence_parallel=None):
    """Of the input, where another pass, of another shape, comes before the layers are computed again."""
    llm = build("llama")
    if sequence_parallel is not None:
        shard_llm(llm, sequence_parallel)
    checkpoint_activations(llm)
    embeds = (0.5 * torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))).requires_grad_()
    hidden = hidden_states(llm, embeds)
    with torch.no_grad():
        hidden_states(llm, embeds[:1, :5])
    hidden.square().sum().backward()
    return embeds.grad


def worker(rank, size, port, results):
    join(rank, size, port)
    torch.cuda.current_device = lambda: "cpu"  # where Megatron's gathers of sequence parallelism allocate
    out = {}
    sharded = build("llama")
    shard_llm(sharded)
    out["energy"] = embedding_energy(sharded.get_input_embeddings())
    for name in MODELS:
        for sequence_parallel in (False, True):
            llm = build(name)
            if sequence_parallel and name == WHOLE_ATTENTION:
                with pytest.raises(ConfigError, match="stays whole on every rank"):
                    shard_llm(llm, sequence_parallel)
                continue
            shard = shard_llm(llm, sequence_parallel)
            out[name, sequence_parallel] = (*measure(llm, shard), sum(p.numel() for p in llm.parameters()))
    for sequence_parallel in (False, True):
        out["recomputed", sequence_parallel] = recomputed_gradient(sequence_parallel)
    for name in LORA[size]:
        for sequence_parallel in (False, True):
            out["lora", name, sequence_parallel] = measure_lora(name, True, sequence_parallel)
    results[rank] = out
    dist.destroy_process_group()


# 4: key/value heads on several ranks
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_equals_whole(size):
    got = on_ranks(size, worker, size, 29520 + size)
    for name in MODELS:
        whole = build(name)
        expected = measure(whole)
        count = sum(p.numel() for p in whole.parameters())
        for rank in range(size):
            for sequence_parallel in (False, True)[: 1 if name == WHOLE_ATTENTION else 2]:
                *values, own = got[rank][name, sequence_parallel]
                assert_same_values(values, expected, name)
                assert name == WHOLE_ATTENTION or own < count * (
                    1 / size + 0.15
                )  # norms, few key/value heads on every rank
    for key in [("recomputed", False), ("recomputed", True)]:
        for rank in range(size):
            close(got[rank][key], recomputed_gradient(), key)
    energy = float(build("llama").get_input_embeddings().weight.square().mean())
    for rank in range(size):
        assert got[rank]["energy"] == pytest.approx(energy, rel=1e-5)
    for name in LORA[size]:
        values, gradients, norm = measure_lora(name)
        for rank in range(size):
            for key in [k for k in got[rank] if k[:2] == ("lora", name)]:
                got_values, got_gradients, got_norm = got[rank][key]
                assert_same_values(got_values, values, key)
                assert got_gradients.keys() == gradients.keys()
                for parameter, gradient in gradients.items():
                    close(got_gradients[parameter], gradient, f"{key} {parameter}")
                torch.testing.assert_close(got_norm, norm)


def assert_same_values(values, expected, name):
    for value, reference in zip(values[:3], expected[:3], strict=True):
        close(value, reference, name)
    assert torch.equal(values[3], expected[3]), name


def close(value, reference, name):
    torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def test_sizes_that_do_not_divide_are_named():
    config = LlamaConfig(num_attention_heads=9, num_key_value_heads=3, hidden_size=576, intermediate_size=1536)
    check_divisible(config, 3)
    with pytest.raises(ConfigError, match=r"9 attention heads, 3 key/value heads.*Sizes that do: 1, 3"):
        check_divisible(config, 2)


def test_a_mixture_of_experts_is_refused():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    llm = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **experts))
    with pretended_ranks(2), pytest.raises(ConfigError, match="experts.*which is no linear layer"):
        shard_llm(llm)


def test_a_quantized_llm_is_named(tmp_path):
    llm = build("llama")
    llm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors")
    empty = empty_llm(llm.config, torch.bfloat16)
    with pretended_ranks(2):
        shard_llm(empty)
        with pytest.raises(ConfigError, match="as F8_E4M3: a quantized LLM"):
            load_shards(empty, tmp_path, torch.device("cpu"))


def generate(llm, tokenizer, **options):
    prompt = "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt")
    out = llm.generate(**ids, max_new_tokens=8, pad_token_id=2, **options)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def smollm2_worker(rank, size, port, folder, results):
    join(rank, size, port)
    llm = empty_llm(AutoConfig.from_pretrained(folder), torch.float32)
    llm.generation_config = GenerationConfig.from_pretrained(folder)
    shard_llm(llm)
    load_shards(llm, folder, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = sum(p.numel() for p in llm.parameters())
    results[rank] = (
        generate(llm, tokenizer, do_sample=False),
        generate(llm, tokenizer, do_sample=False, num_beams=3),
        held,
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_smollm2_read_shard_by_shard_on_three_ranks_says_the_same(smollm2):
    """The real model, from its files: greedy and beam search, and each rank's share of the parameters."""
    llm = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    expected = (generate(llm, tokenizer, do_sample=False), generate(llm, tokenizer, do_sample=False, num_beams=3))
    count = sum(p.numel() for p in llm.parameters())
    for greedy, beam, held in on_ranks(3, smollm2_worker, 3, 29533, smollm2):
        assert (greedy, beam) == expected
        assert held <= count * (1 / 3 + 0.05)


def test_a_hub_name_is_its_snapshot(tiny_llm, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--some--llm"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_llm, snapshot)
    assert local_snapshot("some/llm") == snapshot and local_snapshot(tiny_llm) == Path(tiny_llm)
    with pytest.raises(ConfigError, match="cannot be taken from the hub.*pretrained_llm"):
        local_snapshot("some/other")
