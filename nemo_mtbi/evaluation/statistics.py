"""Bootstrap over utterances: confidence intervals of a ratio of sums, and a paired test between systems.

An utterance is resampled with all its answers, since they share its audio (Bisani & Ney 2004; Koehn 2004 for the paired test).
"""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Sums:
    """A measure by utterance: ids (N), numerators (N,) and denominators (N,)."""

    ids: list[str]
    numerators: np.ndarray
    denominators: np.ndarray

    @classmethod
    def of(cls, rows: dict[str, tuple[float, float]]) -> "Sums":
        ids = sorted(rows)
        values = np.array([rows[i] for i in ids], dtype=np.float64).reshape(-1, 2)
        return cls(ids, values[:, 0], values[:, 1])

    @property
    def ratio(self) -> float:
        return float(self.numerators.sum() / self.denominators.sum())


class Bootstrap:
    """Resampling of one set of utterances; the same seed gives the same resamples to every system.

    Args:
        ids: of the utterances.
        resamples: how many.
        seed: of the draw.
    """

    def __init__(self, ids: list[str], resamples: int, seed: int = 0) -> None:
        self.place = {name: i for i, name in enumerate(sorted(ids))}
        count = len(self.place)
        self.weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)

    def ratios(self, sums: Sums) -> np.ndarray:
        """(resamples,) ratios; resamples without any of the measure's utterances are left out."""
        chosen = self.weights[:, [self.place[i] for i in sums.ids]]
        below = chosen @ sums.denominators
        return np.divide(chosen @ sums.numerators, below, out=np.full(len(below), np.nan), where=below > 0)

    def interval(self, sums: Sums) -> tuple[float, float]:
        """Percentile interval at :data:`LEVEL`."""
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(self.ratios(sums), [tail, 1 - tail])
        return float(low), float(high)

    def compare(self, system: Sums, baseline: Sums) -> dict[str, float]:
        """Paired difference ``system - baseline`` with its interval, and the two-sided p-value of no difference.

        The p-value is twice the smaller share of resamples on one side of zero, and at least 1 / resamples.
        """
        differences = self.ratios(system) - self.ratios(baseline)
        differences = differences[~np.isnan(differences)]
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(differences, [tail, 1 - tail])
        side = min(float((differences <= 0).mean()), float((differences >= 0).mean()))
        p = min(1.0, max(2 * side, 1 / len(differences)))
        return {"difference": system.ratio - baseline.ratio, "low": float(low), "high": float(high), "p": p}
