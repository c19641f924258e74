"""Lightning's DDP over the data-parallel ranks of a Megatron-Core layout (tensor x data parallel)."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from megatron.core import parallel_state
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.parallel.launch import PATIENCE, backend, initialize
from nemo_mtbi.parallel.sharded_optimizer import ShardedOptimizer

SIZE = "tensor_model_parallel_size"
OURS = ("auto", "ddp", "DDPStrategy", "TensorParallelStrategy")  # get our defaults and their own arguments


def ddp_options(**own: Any) -> dict[str, Any]:
    """Arguments of ``DDPStrategy``: ``own``, and our defaults.

    The ``timeout`` is long, because ranks may wait for the one that draws the data up to its place again; a rank that
    dies ends the job at once all the same. Buffers hold the LLM's embeddings, the same on all ranks, and are not
    broadcast. Gradients are kept once, in the buffers that are sent.
    """
    defaults = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "process_group_backend": backend()}
    return {"timeout": PATIENCE, **defaults, **own}


def name_of(strategy: Any) -> str:
    """Of a strategy in YAML: Lightning's short name, or that of its class."""
    target = strategy.get("_target_", "") if isinstance(strategy, Mapping) else strategy or "auto"
    return str(target).rpartition(".")[2]


def requested_size(trainer: DictConfig) -> int:
    """Ranks that hold one LLM, as ``trainer.strategy`` says, or the short ``trainer.tensor_model_parallel_size``.

    ``strategy: {_target_: nemo_mtbi.parallel.strategy.TensorParallelStrategy, tensor_model_parallel_size: 8}`` is what
    the short form stands for; Lightning's DDP keeps the LLM whole.

    Raises:
        ConfigError: both, and they differ; a strategy that would shard what is trained, or the LLM in its own way.
    """
    short, strategy = trainer.get("tensor_model_parallel_size") or 1, trainer.get("strategy", "auto")
    name = name_of(strategy)
    if name == TensorParallelStrategy.__name__:
        size = strategy.get(SIZE) if isinstance(strategy, Mapping) else None
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"trainer.strategy.{SIZE}={size!r}: the number of ranks that hold one LLM.")
        if short not in (1, size):
            raise ConfigError(f"trainer.{SIZE}={short} and trainer.strategy.{SIZE}={size} differ; give one of them.")
        return size
    if any(word in name.lower() for word in ("modelparallel", "fsdp", "deepspeed")):
        raise ConfigError(
            f"trainer.strategy={name} would shard the LLM in its own way, which cannot be exported again. Use "
            f"{{_target_: {__name__}.{TensorParallelStrategy.__name__}, {SIZE}: 8}}, or ddp, with "
            "model.shard_optimizer=true where much is trained."
        )
    if short > 1 and name != "auto":
        raise ConfigError(f"trainer.{SIZE}={short} chooses the strategy; leave trainer.strategy={name} out.")
    return short


class TensorParallelStrategy(DDPStrategy):
    """Every ``tensor_model_parallel_size`` consecutive ranks hold one LLM together and see the same batches.

    Gradients of what is trained (replicated on all ranks of a tensor-parallel group, with equal gradients) are
    averaged over the data-parallel group only. Weights that are trained are not sharded: the connector is
    small. Its optimizer's states may be (``model.shard_optimizer``).

    Args:
        tensor_model_parallel_size: ranks of one LLM.
        ddp: see :func:`ddp_options`.

    Raises:
        ConfigError: the number of processes is no multiple of ``tensor_model_parallel_size``.
    """

    def __init__(self, tensor_model_parallel_size: int, **ddp: Any) -> None:
        super().__init__(**ddp_options(**ddp))
        self.tensor_model_parallel_size = tensor_model_parallel_size
        self.device_mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        """Process groups, then the mesh that NeMo's data module and its batch broadcast read."""
        super().setup_environment()
        size = self.tensor_model_parallel_size
        initialize(size, self._timeout or PATIENCE)
        groups = [parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()]
        self.device_mesh = DeviceMesh.from_group(
            groups,
            self.root_device.type,
            torch.arange(self.world_size).view(-1, size),
            mesh_dim_names=("data_parallel", "tp"),
        )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self.device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        assert self.device_mesh is not None
        group = self.device_mesh["data_parallel"]
        return {"num_replicas": group.size(), "rank": group.get_local_rank()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Spread states, whole, on every rank of the first LLM, which puts its parts of LoRA together; else nothing."""
        own = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
        if not isinstance(own, ShardedOptimizer):
            return super().optimizer_state(optimizer)
        own.consolidate_state_dict()
        return {} if own.rank else own.state_dict()

    def _setup_model(self, model: torch.nn.Module) -> Any:
        assert self.device_mesh is not None
        self._ddp_kwargs["process_group"] = parallel_state.get_data_parallel_group()
        wrapped = super()._setup_model(model)
        wrapped.device_mesh = self.device_mesh  # NeMo's DataModule looks for it there
        return wrapped
