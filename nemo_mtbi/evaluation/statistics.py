"""Bootstrap over utterances: confidence intervals of scores that are functions of sums, and a paired test between
systems.

An utterance is resampled with all its answers, since they share its audio (Bisani & Ney 2004; Koehn 2004 for the
paired test).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
LEAST_UNITS = 10  # below, resampling knows too little: of 5 units, a sixth of all true null hypotheses has p < 0.05
BLOCK = 100  # resamples at once: their weights are copied as numbers of eight bytes
Score = Callable[[np.ndarray], np.ndarray]  # sums (..., k) -> scores (...)


def ratio(sums: np.ndarray) -> np.ndarray:
    """Numerator over denominator (..., 2); NaN where that is 0."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


@dataclass(frozen=True)
class Sums:
    """A measure by utterance: ids (N), values (N, k), and the score that sums of the values give."""

    ids: list[str]
    values: np.ndarray
    score: Score = ratio

    @classmethod
    def of(cls, rows: dict[str, tuple[float, ...]], score: Score = ratio) -> "Sums":
        ids = sorted(rows)
        return cls(ids, np.array([rows[i] for i in ids], dtype=np.float64), score)

    @property
    def value(self) -> float:
        return float(self.score(self.values.sum(0)))


class Bootstrap:
    """Resampling of one set of utterances; the same seed gives the same resamples to every system.

    Fewer than :data:`LEAST_UNITS` have no interval and no p-value (NaN).

    Args:
        ids: of the utterances, or of the speakers or sentences that are resampled with all that is theirs.
        resamples: how many.
        seed: of the draw.
    """

    def __init__(self, ids: list[str], resamples: int, seed: int = 0) -> None:
        self.place = {name: i for i, name in enumerate(sorted(ids))}
        count = len(self.place)
        self.weights = (
            np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.int32)
        )

    def scores(self, sums: Sums) -> np.ndarray:
        """(resamples,) scores; NaN for resamples without any of the measure's utterances."""
        places = [self.place[i] for i in sums.ids]
        blocks = [self.weights[i : i + BLOCK, places] @ sums.values for i in range(0, len(self.weights), BLOCK)]
        return sums.score(np.concatenate(blocks)) if blocks else np.zeros(0)

    def interval(self, sums: Sums) -> tuple[float, float]:
        """Percentile interval at :data:`LEVEL`."""
        if len(sums.ids) < LEAST_UNITS:
            return float("nan"), float("nan")
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(self.scores(sums), [tail, 1 - tail])
        return float(low), float(high)

    def compare(self, system: Sums, baseline: Sums) -> dict[str, float]:
        """Paired difference ``system - baseline`` with its interval, and the two-sided p-value of no difference.

        The p-value is twice the smaller share of resamples on one side of zero, the observed one counted to them
        (Davison & Hinkley 1997, 4.2).
        """
        differences = self.scores(system) - self.scores(baseline)
        differences = differences[~np.isnan(differences)]
        if not len(differences) or len(system.ids) < LEAST_UNITS:
            unknown = dict.fromkeys(("low", "high", "p"), float("nan"))
            return {"difference": system.value - baseline.value} | unknown
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(differences, [tail, 1 - tail])
        side = 1 + min(int((differences <= 0).sum()), int((differences >= 0).sum()))
        p = min(1.0, 2 * side / (1 + len(differences)))
        return {"difference": system.value - baseline.value, "low": float(low), "high": float(high), "p": p}


def interval_text(score: dict[str, Any], sign: str = "") -> str:
    """`` [low, high]``; nothing where there are too few units for an interval."""
    return "" if score["low"] is None else f" [{score['low']:{sign}.3f}, {score['high']:{sign}.3f}]"
