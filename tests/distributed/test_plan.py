"""`mtbi plan`: bytes on real layers, arithmetic beside them."""

import pytest
import torch.distributed as dist
from transformers import AutoConfig, LlamaConfig

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.parallel.plan import measured, plan
from nemo_mtbi.parallel.plan_config import PlanConfig, Positions
from tests.launching import launch

pytestmark = pytest.mark.unit
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPE |= {"vocab_size": 1000, "num_hidden_layers": 3}
LLAMA = LlamaConfig(**SHAPE, tie_word_embeddings=False)


def test_bytes_are_those_of_the_layers():
    alone = measured(LLAMA, 1)
    whole = alone.whole_bytes
    attention, mlp, norms = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 128, 2 * 64
    assert whole == alone.own_bytes == 2 * (3 * (attention + mlp + norms) + 64 + 2 * 1000 * 64)
    spread = measured(LLAMA, 4)
    own = spread.own_bytes
    assert spread.whole_bytes == whole and not dist.is_initialized()
    # Norms are whole; Megatron pads the vocabulary of each rank to a multiple of 128 at most.
    rest = own - 2 * (3 * (attention // 4 + mlp // 4 + norms) + 64)
    assert 2 * 2 * 250 * 64 <= rest <= 2 * 2 * 384 * 64
    with pytest.raises(ConfigError, match="does not divide this LLM"):
        measured(LLAMA, 3)


def test_what_fits_and_how_long_it_takes():
    connector = {"connector_parameters": 20e6, "connector_mb_per_example": 0.5, "positions": Positions(per_second=12.5)}
    config = PlanConfig(
        llm="", gpus=4, hours_of_speech=100, utterance_seconds=8, gpu_memory_gb=6.0, teacher="cached", **connector
    )
    found = plan(config, LLAMA)
    assert found.example_positions == 60 + 100 + 60 and found.examples == 45_000 and found.fits
    free = 6e9 - sum(found.bytes_by_part.values())
    assert found.longest_batch == int(free / (26 * 64 * 3 + 0.5e6 / 220))
    assert found.hours == pytest.approx(found.examples * 220 / found.positions_per_second / 3600)
    config.teacher = "online"
    assert plan(config, LLAMA).hours == pytest.approx(1.5 * found.hours)
    config.gpu_memory_gb = 2.0
    assert not plan(config, LLAMA).fits
    config.shard_optimizer = True
    whole, spread = (own.bytes_by_part["connector, gradients, Adam"] for own in (found, plan(config, LLAMA)))
    assert (whole, spread) == (16 * 20e6, 10 * 20e6)  # 4 ranks share Adam's two moments
    config.gpu_memory_gb, config.activation_checkpointing, config.shard_optimizer = 6.0, True, False
    assert plan(config, LLAMA).longest_batch > found.longest_batch


def test_activations_that_stay_whole_on_every_rank():
    """Both norms keep an input and a normalized value in float32 (measured on a layer of Llama-70B cut for 8 ranks)."""
    whole = PlanConfig(llm="", gpus=4, tensor_model_parallel_size=4)
    assert plan(whole, LLAMA).bytes_per_position == 3 * 64 * (18 / 4 + 8)
    whole.sequence_parallel = True
    assert plan(whole, LLAMA).bytes_per_position == 3 * 64 * 26 / 4


@pytest.mark.parametrize(
    ("kind", "shape", "kept"),
    [
        ("qwen2", {"intermediate_size": 340}, 31.9 + 6 + 8),
        ("qwen3", {"head_dim": 16}, 12 + 12 + 8 + 12),  # normalized queries and keys
        ("gemma2", {"head_dim": 16}, 12 + 12 + 16),  # norms before and after
    ],
)
def test_what_a_layer_keeps_depends_on_its_parts(kind, shape, kept):
    """Bytes a position and unit of width; measured with saved-tensor hooks: Qwen2.5-7B 44.3, Qwen3-8B 36.0."""
    found = measured(AutoConfig.for_model(kind, **(SHAPE | shape)), 1)
    assert (found.shared_bytes + found.norm_bytes) / 64 == pytest.approx(kept, abs=0.1)


def test_a_mixture_computes_with_a_few_of_its_experts():
    few = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    found = measured(AutoConfig.for_model("qwen3_moe", **(SHAPE | few)), 1)
    attention, experts, router = 2 * 64 * 128 + 2 * 64 * 64, 2 * 3 * 64 * 32, 8 * 64
    assert found.layer_weights == pytest.approx(3 * (attention + experts + router))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 6, "tensor_model_parallel_size": 4}, "gpus=6 cannot be divided into groups"),
        ({"utilization": 0.0}, "utilization=0.0"),
        ({"teacher": "offline"}, "teacher cached or online"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        PlanConfig(llm="", **changes).check()


def test_the_command_answers_without_weights():
    shape = ", ".join(f"{name}: {value}" for name, value in SHAPE.items())
    told = launch("plan", f"llm={{model_type: llama, {shape}}}", "gpus=8", "tensor_model_parallel_size=4")
    assert "8 GPUs, 4 for each copy" in told and "GPU-hours" in told and "no measurement" in told
    assert "Give a hub name" in launch("plan", "llm={model_type: nothing}", ok=False)
