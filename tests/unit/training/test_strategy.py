"""How many ranks hold one LLM: as a strategy in YAML, or in short; what cannot be is refused by name."""

import pytest
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.parallel.strategy import TensorParallelStrategy, requested_size
from nemo_mtbi.training.stages import build_trainer

pytestmark = pytest.mark.unit
OURS = "nemo_mtbi.parallel.strategy.TensorParallelStrategy"


def trainer(strategy="auto", short=1):
    return OmegaConf.create({"strategy": strategy, "tensor_model_parallel_size": short})


@pytest.mark.parametrize(
    ("strategy", "short", "size"),
    [
        ("auto", 1, 1),
        ("auto", 4, 4),
        ("ddp", 1, 1),
        ({"_target_": OURS, "tensor_model_parallel_size": 4}, 1, 4),
        ({"_target_": OURS, "tensor_model_parallel_size": 4}, 4, 4),
        ({"_target_": "lightning.pytorch.strategies.DDPStrategy"}, 1, 1),
    ],
)
def test_sizes(strategy, short, size):
    assert requested_size(trainer(strategy, short)) == size


@pytest.mark.parametrize(
    ("strategy", "short", "message"),
    [
        ({"_target_": OURS, "tensor_model_parallel_size": 4}, 2, "=2 and trainer.strategy.*=4 differ"),
        ({"_target_": OURS}, 1, "size=None: the number of ranks"),
        (OURS, 1, "size=None: the number of ranks"),
        ({"_target_": OURS, "tensor_model_parallel_size": 0}, 1, "size=0: the number of ranks"),
        ("ddp", 2, "leave trainer.strategy=ddp out"),
        ({"_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}, 1, "ModelParallelStrategy would shard"),
        ("fsdp", 1, "fsdp would shard the LLM in its own way"),
        ("deepspeed_stage_3", 2, "deepspeed_stage_3 would shard"),
    ],
)
def test_refusals(strategy, short, message):
    with pytest.raises(ConfigError, match=message):
        requested_size(trainer(strategy, short))


def test_the_strategy_of_the_yaml_has_our_defaults_and_its_own_arguments():
    strategy = {"_target_": OURS, "tensor_model_parallel_size": 2, "gradient_as_bucket_view": False}
    options = {"strategy": strategy, "accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    own = build_trainer(OmegaConf.create(options), "alignment", find_unused=True).strategy
    assert isinstance(own, TensorParallelStrategy) and own.tensor_model_parallel_size == 2
    assert not own._ddp_kwargs["gradient_as_bucket_view"] and own._ddp_kwargs["find_unused_parameters"]
    assert own._ddp_kwargs["broadcast_buffers"] is False


@pytest.mark.parametrize(
    "strategy",
    ["ddp", "auto", {"_target_": "lightning.pytorch.strategies.DDPStrategy", "gradient_as_bucket_view": False}],
)
def test_ddp_by_any_name_has_our_defaults(strategy):
    options = {"strategy": strategy, "accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    own = build_trainer(OmegaConf.create(options), "alignment", find_unused=True).strategy
    assert type(own) is DDPStrategy and own._ddp_kwargs["find_unused_parameters"]
    assert own._ddp_kwargs["gradient_as_bucket_view"] is not isinstance(strategy, dict)
