"""What fills the feature cache: the frozen encoder, and the connector's recognizer if it is frozen, without an LLM."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from nemo.collections.speechlm2.modules import AudioPerceptionModule
from omegaconf import DictConfig
from torch import Tensor

from nemo_mtbi.config import model_config, plain
from nemo_mtbi.models.speech import encode
from nemo_mtbi.modules.perception import (
    encoder_key,
    freeze,
    frozen_recognizer,
    require_fixed_features,
    setup_perception,
)
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained


class FrozenEncoder:
    """Preprocessor and encoder, without the LLM, and the connector's recognizer where it is frozen: what fills the
    feature cache.

    Attributes:
        key: of the features.
        writing_key: of the recognizer; None without one.

    Args:
        cfg: the ``model`` section of a configuration.
    """

    def __init__(self, cfg: DictConfig) -> None:
        config = model_config(cfg)
        self.given, self.cfg = cfg, DictConfig(plain(cfg))
        self.cfg.pretrained_weights = True
        self.cfg.perception.pop("fusion", None)  # what is cached comes before it
        self.cfg.perception.modality_adapter = {
            "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector"
        }
        self.llm = SimpleNamespace(config=SimpleNamespace(hidden_size=1))
        self.perception: Any = None
        setup_perception(self)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.perception = cast(AudioPerceptionModule, self.perception).to(self.device).eval()
        freeze(self.perception.named_parameters(prefix="perception"), config)
        require_fixed_features(self.perception)
        self.perception.encoder.to(getattr(torch, config.encoder_dtype))
        self.key = encoder_key(
            self.cfg.perception, fingerprint(resolve_pretrained(config.pretrained_asr)), config.encoder_dtype
        )
        recognizer = frozen_recognizer(self.cfg.perception, config)
        self.writing_key = None if recognizer is None else recognizer.writing_key()
        self.recognizer = None if recognizer is None or self.writing_key is None else recognizer.to(self.device)
        self.sampling_rate: int = self.perception.preprocessor.featurizer.sample_rate

    def encode(self, audios: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        return encode(self.perception, audios.to(self.device), audio_lens.to(self.device))

    def write(self, features: Tensor, lengths: Tensor) -> list[list[int]] | None:
        """features (N, T, D) as they are kept, lengths (N,) -> the recognizer's tokens of each window, if any."""
        return None if self.recognizer is None else self.recognizer.write(features.float(), lengths)
