"""Optimizer states spread over the data-parallel ranks: ZeRO stage 1 (arXiv 1910.02054), by PyTorch's own class.

Weights and gradients stay whole on every rank, as DDP has them, so ranks may run the LLM as often as their examples
need, which FSDP does not allow.
"""

from typing import Any

import torch
import torch.distributed as dist
from hydra.utils import get_class
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """Each rank keeps the states of its share of the parameters, updates these, and sends them to the others.

    Checkpoints hold whole states (:meth:`consolidate_state_dict`), so they do not depend on the number of ranks.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """PyTorch keeps a second copy of this rank's states, and moves all step counts to the CPU, where fused
        optimizers cannot use them; both are undone."""
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        self.state.clear()
        for group in self.optim.param_groups:
            if group.get("fused") or group.get("capturable"):
                for parameter in group["params"]:
                    state = self.optim.state.get(parameter, {})
                    state.update({k: v.to(parameter.device) for k, v in state.items() if isinstance(v, Tensor)})

    def whole_states(self) -> dict[Tensor, dict[str, Any]]:
        """States of all parameters, on the CPU, for the first rank; nothing for the others. All call this together."""
        self.consolidate_state_dict()
        if self.rank:
            return {}
        states = self.state_dict()["state"]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return {parameters[index]: state for index, state in states.items()}


def sharded(optimizer: torch.optim.Optimizer, target: str, options: dict[str, Any], group: Any) -> Any:
    """An optimizer like the one given, with its states spread.

    Args:
        optimizer: that has taken no step; its parameter groups are kept.
        target: its class.
        options: that it was made with.
        group: data-parallel ranks (None: all).
    """
    groups = [dict(own) for own in optimizer.param_groups]
    return ShardedOptimizer(groups, get_class(target), process_group=group or dist.group.WORLD, **options)


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The one that keeps this rank's states."""
    return optimizer.optim if isinstance(optimizer, ShardedOptimizer) else optimizer


def whole_states(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    """States by parameter; of spread ones, see :meth:`ShardedOptimizer.whole_states`."""
    return optimizer.whole_states() if isinstance(optimizer, ShardedOptimizer) else dict(optimizer.state)
