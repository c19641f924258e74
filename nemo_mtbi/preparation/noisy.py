"""Noise under a share of the recordings, so that a model can learn what noise is, and to hear through it."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lhotse import Recording
from lhotse.cut import Cut, MonoCut
from lhotse.utils import fastcopy

from nemo_mtbi.data.alignments import from_its_beginning
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.preparation.no_speech import LOWEST_NOISE_HZ, noise, write_flac

NOISE_FIELD = "noise_snr_db"  # in a cut's custom fields


@dataclass
class NoiseConfig:
    """``noise`` of ``conf/prepare.yaml``.

    Attributes:
        share: of the utterances (by their ids) that are mixed with white, pink or brown noise; the others stay as they
            are.
        snr_db: lowest and highest ratio of speech to noise over the whole utterance.
        seed: of the draws.
    """

    share: float = 0.0
    snr_db: list[float] = field(default_factory=lambda: [0.0, 12.0])
    seed: int = 0

    def check(self) -> None:
        """
        Raises:
            ConfigError: names the setting.
        """
        if not 0 <= self.share <= 1:
            raise ConfigError(f"noise.share={self.share}: give a share from 0 to 1.")
        if len(self.snr_db) != 2 or not self.snr_db[0] <= self.snr_db[1]:
            raise ConfigError(f"noise.snr_db={self.snr_db}: give [lowest, highest] in dB.")


def with_noise(cut: Cut, samples: np.ndarray, rate: int, config: NoiseConfig, folder: Path) -> tuple[Cut, np.ndarray]:
    """The cut over a noisy copy of its audio in ``folder`` (FLAC, mono) and that copy's samples, or both as they are.

    Args:
        cut: with word times, which hold for the copy.
        samples: (S,) of the cut, mono.
        rate: of the samples.
    """
    rng = np.random.default_rng(list(hashlib.blake2b(f"{config.seed}/{cut.id}".encode()).digest()))
    if rng.random() >= config.share or not samples.any():
        return cut, samples
    snr = float(rng.uniform(config.snr_db[0], config.snr_db[1]))
    added = noise(len(samples), rng).astype(np.float32)
    power, of_noise = np.mean(np.square(samples, dtype=np.float64)), np.mean(np.square(added, dtype=np.float64))
    mixed = samples + added * np.float32(np.sqrt(power / max(of_noise, 1e-20) / 10 ** (snr / 10)))
    mixed /= max(1.0, float(np.abs(mixed).max()))
    made_of = f"{cut.id}/{config.seed}/{list(config.snr_db)}/{LOWEST_NOISE_HZ}"
    path = folder / f"{hashlib.blake2b(made_of.encode(), digest_size=12).hexdigest()}.flac"
    write_flac(path, mixed, rate)
    cut, recording = from_its_beginning(cut), Recording.from_file(path, recording_id=cut.id)
    own = [fastcopy(s, recording_id=cut.id, channel=0) for s in cut.supervisions]
    noted = {**(cut.custom or {}), NOISE_FIELD: round(snr, 2)}
    return MonoCut(cut.id, 0.0, recording.duration, 0, recording=recording, supervisions=own, custom=noted), mixed
