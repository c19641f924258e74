"""Trained parameters in groups with their own learning rate and weight decay, chosen by their names."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from nemo_mtbi.config import ParameterGroupConfig
from nemo_mtbi.errors import ConfigError


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], groups: list[ParameterGroupConfig]
) -> list[dict[str, Any]]:
    """Trained parameters as PyTorch's parameter groups, in the order of the model within each.

    Args:
        named: trained parameters by name.
        groups: the first match wins; the rest comes last, with the optimizer's own settings.

    Raises:
        ConfigError: a pattern matches nothing that is trained.
    """
    named = list(named)
    members: list[list[nn.Parameter]] = [[] for _ in groups]
    rest: list[nn.Parameter] = []
    for name, parameter in named:
        place = next((i for i, group in enumerate(groups) if re.match(group.pattern, name)), None)
        (rest if place is None else members[place]).append(parameter)
    for group, own in zip(groups, members, strict=True):
        if not own:
            raise ConfigError(
                f"model.parameter_groups: {group.pattern!r} matches no trained parameter that an earlier group leaves. "
                f"Trained are, for example, {', '.join(name for name, _ in named[:3])}."
            )
    settings = [{k: v for k, v in (("lr", g.lr), ("weight_decay", g.weight_decay)) if v is not None} for g in groups]
    result = [{"params": own, **setting} for own, setting in zip(members, settings, strict=True)]
    return [*result, {"params": rest}] if rest else result
