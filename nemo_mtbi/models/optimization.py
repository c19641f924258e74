"""The optimizer: parameter groups by pattern, and moments that go on from one stage to the next."""

from collections.abc import Iterable
from typing import Any

import torch
from nemo.core.classes.common import safe_instantiate
from torch import Tensor, nn

from nemo_mtbi.modules.parameter_groups import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam and its kin


def build_optimizer(model: Any) -> dict[str, Any]:
    """What Lightning's ``configure_optimizers`` gives, as NeMo's speechlm2 builds it, with our groups."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = safe_instantiate(
        model.cfg.optimizer, parameter_groups(trained, model.config.parameter_groups), _convert_="all"
    )
    if model.moments:
        continue_moments(optimizer, trained, model.moments)
    result: dict[str, Any] = {"optimizer": optimizer}
    if "lr_scheduler" in model.cfg:
        scheduler = safe_instantiate(model.cfg.lr_scheduler, optimizer)
        result["lr_scheduler"] = {"scheduler": scheduler, "interval": "step", "frequency": 1}
    return result


def moments_of(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Adam's moments by parameter and kind: ``name/exp_avg``, on the CPU."""
    found: dict[str, Tensor] = {}
    for name, parameter in named:
        state = optimizer.state.get(parameter, {})
        for kind in MOMENTS:
            if isinstance(state.get(kind), Tensor):
                found[f"{name}/{kind}"] = state[kind].detach().cpu().clone()
    return found


def continue_moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], moments: dict[str, Tensor]
) -> int:
    """Give an optimizer the moments of parameters that have the same name and shape. -> how many parameters."""
    continued = 0
    for name, parameter in named:
        own = {kind: moments[f"{name}/{kind}"] for kind in MOMENTS if f"{name}/{kind}" in moments}
        if "exp_avg" in own and own["exp_avg"].shape == parameter.shape:
            on_device = {k: v.to(parameter.device) for k, v in own.items() if k != "step"}
            optimizer.state[parameter] = on_device | {"step": own["step"]}
            continued += 1
    return continued
