"""Weights and form of the imitation objective, and what a teacher gives."""

from dataclasses import dataclass

from torch import Tensor

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.divergence import DIVERGENCES


@dataclass(frozen=True)
class ImitationObjective:
    """Weights and form of the objective.

    Attributes:
        w_ce: weight of the cross-entropy with the teacher's response tokens. Both weights may be 0: the control
            that trains the connector's own loss alone.
        w_kl: weight of the divergence from the teacher's distribution.
        temperature: T, applied to both distributions; the divergence is multiplied by T^2.
        divergence: ``forward_kl``, ``reverse_kl`` or ``jensen_shannon``.

    Raises:
        ConfigError: unknown divergence, negative weight, or temperature that is not positive.
    """

    w_ce: float = 1.0
    w_kl: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ConfigError(f"Unknown divergence {self.divergence!r}. Known: {', '.join(DIVERGENCES)}.")
        if self.w_ce < 0 or self.w_kl < 0:
            raise ConfigError(f"w_ce={self.w_ce}, w_kl={self.w_kl}: weights must be >= 0.")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be positive.")


CROSS_ENTROPY = ImitationObjective(w_ce=1.0, w_kl=0.0)


@dataclass(frozen=True)
class CachedTeacher:
    """Top-k of the teacher's distribution *at the objective's temperature*; the remaining mass is one rest bucket.

    Attributes:
        token_ids: (R, K) int64.
        log_probs: (R, K) log-probabilities at the temperature of the objective.
    """

    token_ids: Tensor
    log_probs: Tensor
