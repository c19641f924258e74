"""The optimizer: parameter groups by pattern, and moments that go on from one stage to the next."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from nemo.core.classes.common import safe_instantiate
from torch import Tensor, nn

from nemo_mtbi.config import plain
from nemo_mtbi.modules.parameter_groups import parameter_groups
from nemo_mtbi.parallel.launch import tensors_from_first_rank
from nemo_mtbi.parallel.ranks import distributed
from nemo_mtbi.parallel.sharded_optimizer import local_optimizer, sharded, whole_states

log = logging.getLogger(__name__)
STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq", STEP)  # of Adam and its kin


def build_optimizer(model: Any) -> dict[str, Any]:
    """What Lightning's ``configure_optimizers`` gives, as NeMo's speechlm2 builds it, with our groups."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = safe_instantiate(
        model.cfg.optimizer, parameter_groups(trained, model.config.parameter_groups), _convert_="all"
    )
    if model.config.shard_optimizer and distributed():
        options = {k: v for k, v in plain(model.cfg.optimizer).items() if k != "_target_"}
        optimizer = sharded(optimizer, model.cfg.optimizer._target_, options, model.data_parallel_group())
    moments = tensors_from_first_rank(model.earlier_moments)  # others may not see the file
    if moments and not keeps_moments(optimizer):
        log.warning("%s begins anew: it keeps other things than Adam's moments.", type(optimizer).__name__)
    elif moments:
        continue_moments(optimizer, trained, moments)
    result: dict[str, Any] = {"optimizer": optimizer}
    if model.cfg.get("lr_scheduler") is not None:
        scheduler = safe_instantiate(model.cfg.lr_scheduler, optimizer)
        result["lr_scheduler"] = {"scheduler": scheduler, "interval": "step", "frequency": 1}
    return result


def moments_of(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Adam's moments by parameter and kind: ``name/exp_avg``, on the CPU. All ranks call this; where they are spread,
    the first one gets them."""
    found: dict[str, Tensor] = {}
    groups, states = groups_of(optimizer), whole_states(optimizer)
    for name, parameter in named:
        state = states.get(parameter)
        if state:
            counted = {STEP: torch.as_tensor(groups[parameter][STEP])} if STEP in groups[parameter] else {}
            for kind, value in (counted | state).items():
                if kind in MOMENTS and isinstance(value, Tensor):
                    found[f"{name}/{kind}"] = value.detach().cpu().clone()
    return found


def keeps_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's state of a parameter is :data:`MOMENTS` and nothing else."""
    optimizer = local_optimizer(optimizer)
    kinds = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam)
    alike = isinstance(optimizer, kinds) or type(optimizer).__name__ == "FusedAdam"  # apex's
    return alike and not any(group.get("amsgrad") for group in optimizer.param_groups)


def groups_of(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
    """The group of each parameter; apex's optimizers count steps there."""
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def continue_moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], moments: dict[str, Tensor]
) -> int:
    """Give an optimizer the moments of parameters that have the same name and shape. -> how many parameters, of those
    whose states this rank keeps."""
    optimizer = local_optimizer(optimizer)
    continued, groups = 0, groups_of(optimizer)
    for name, parameter in named:
        if parameter not in groups:
            continue
        own = {kind: moments[f"{name}/{kind}"] for kind in MOMENTS if f"{name}/{kind}" in moments}
        if own.keys() != set(MOMENTS) or own["exp_avg"].shape != parameter.shape:
            continue
        step, group = own.pop(STEP).float(), groups[parameter]
        state = {kind: value.to(parameter.device) for kind, value in own.items()}
        if type(optimizer).__module__.startswith("apex."):
            group[STEP] = int(step)
        elif group.get("fused") or group.get("capturable"):  # as torch.optim.Optimizer.load_state_dict does
            state[STEP] = step.to(parameter.device)
        else:
            state[STEP] = step
        optimizer.state[parameter] = state
        continued += 1
    return continued
