"""Speed perturbation of training speech (Ko et al., Interspeech 2015), by Lhotse; features may come from the cache."""

import random
from collections.abc import Iterable
from typing import Any

from lhotse.cut import Cut
from lhotse.cut.data import DataCut

from nemo_mtbi.data.feature_cache import FEATURES_FIELD, windows_field, with_span, written_field
from nemo_mtbi.errors import ConfigError


def speed_factors(factors: Iterable[Any] | None) -> tuple[float, ...]:
    """Checked factors; 1 stands for the recording as it is and is left out.

    Raises:
        ConfigError: not a list of numbers from 0.5 to 2.
    """
    if factors is None:
        return ()
    wrong = f"perturb_speed={factors}: give a list of factors from 0.5 to 2, such as [0.9, 1.1]."
    if isinstance(factors, (str, bool, int, float)):
        raise ConfigError(wrong)
    try:
        numbers = [float(f) for f in factors]
    except (TypeError, ValueError):
        raise ConfigError(wrong) from None
    if not all(0.5 <= f <= 2 for f in numbers):
        raise ConfigError(wrong)
    return tuple(dict.fromkeys(f for f in numbers if f != 1))


def features_field(factor: float) -> str:
    """Field of a cut that holds its cached features at this speed."""
    # Without a point: in Lhotse Shar it would end the field's name.
    return FEATURES_FIELD if factor == 1 else f"{FEATURES_FIELD}_sp{factor:g}".replace(".", "p")


def perturbed(cut: Cut, factor: float) -> Cut:
    """The cut at another speed under its own id; its cached features are those of that speed, or none."""
    if factor == 1:
        return cut
    custom = dict(cut.custom or {})
    field = features_field(factor)
    before = f"{FEATURES_FIELD}_sp{factor:g}"  # until November 2026
    if before in custom:
        custom[field] = custom.pop(before)
    for part in (str, windows_field, written_field):
        name, own = part(FEATURES_FIELD), part(field)
        custom.pop(name, None)
        if own in custom:
            custom[name] = custom.pop(own)
    result = cut.perturb_speed(factor, affix_id=False)
    result.custom = custom
    return with_span(result, cut) if isinstance(cut, DataCut) else result


class SpeedPerturbation:
    """At every visit another speed of a cut: the recording's own and ``factors``, each once in a round of visits, in an
    order that is drawn anew for every round, so that no wording of a target always comes at the same speed.

    Args:
        factors: see :func:`speed_factors`; pitch changes with speed.
        seed: of the order.
    """

    def __init__(self, factors: Iterable[Any] | None, seed: int = 0) -> None:
        self.speeds = (1.0, *speed_factors(factors))
        self.seed = seed

    def __call__(self, cut: Cut, visit: int) -> Cut:
        round_, place = divmod(visit, len(self.speeds))
        order = random.Random(f"{self.seed}/{cut.id}/speed/{round_}").sample(self.speeds, len(self.speeds))
        return perturbed(cut, order[place])
