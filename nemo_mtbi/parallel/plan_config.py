"""Configuration of ``mtbi plan`` (nothing heavy is imported, so that the launcher answers at once)."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_mtbi.errors import ConfigError

GB = 1e9


@dataclass
class Positions:
    """Positions of an example.

    Attributes:
        prompt: tokens around the speech.
        per_second: of the connector: about 4 of one that writes the LLM's tokens, 12.5 of the dense one.
        response: tokens.
    """

    prompt: int = 60
    per_second: float = 4.0
    response: int = 60


@dataclass
class PlanConfig:
    """``conf/plan.yaml``.

    Attributes:
        llm: a hub name, a folder, ``offline:NAME``, or ``model_type`` and fields of a Transformers configuration.
        encoder_parameters: of the frozen speech encoder; 0 with cached features.
        connector_parameters: that are trained; the default connector is Whisper's decoder (here large-v3's).
        connector_mb_per_example: activations of the connector's forward passes; large-v3's decoder keeps 320 to 380 MB
            (bfloat16, float32) of 10 s in one pass, and the transcription loss is a second. A dense one: about 10.
        gpus: in all.
        tensor_model_parallel_size: n.
        sequence_parallel: as ``model.sequence_parallel``.
        shard_optimizer: as ``model.shard_optimizer``.
        gpu_memory_gb, gpu_tflops: of one GPU; dense bf16.
        utilization: of ``gpu_tflops`` that the LLM's matrix products reach.
        activation_checkpointing: as ``model.activation_checkpointing``.
        teacher: ``online``, as training has it (one forward pass more), or ``cached`` (its log-probabilities come with
            the targets).
        hours_of_speech, utterance_seconds: of the corpus.
        examples_per_utterance: that are trained on, of an epoch.
        epochs: rounds.
        positions: see :class:`Positions`.
        trust_remote_code: of the LLM's configuration.
    """

    llm: Any = MISSING
    encoder_parameters: float = 0.64e9
    connector_parameters: float = 0.84e9
    connector_mb_per_example: float = 640.0
    gpus: int = 8
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    shard_optimizer: bool = False
    gpu_memory_gb: float = 80.0
    gpu_tflops: float = 989.0
    utilization: float = 0.35
    activation_checkpointing: bool = False
    teacher: str = "online"
    hours_of_speech: float = 10_000.0
    utterance_seconds: float = 10.0
    examples_per_utterance: float = 1.0
    epochs: float = 1.0
    positions: Positions = field(default_factory=Positions)
    trust_remote_code: bool = False

    def check(self) -> None:
        """
        Raises:
            ConfigError: names the setting.
        """
        for name in ("gpus", "tensor_model_parallel_size", "gpu_memory_gb", "gpu_tflops", "utilization"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be above 0.")
        if self.gpus % self.tensor_model_parallel_size:
            raise ConfigError(
                f"gpus={self.gpus} cannot be divided into groups of "
                f"tensor_model_parallel_size={self.tensor_model_parallel_size}."
            )
        if self.utterance_seconds <= 0 or self.teacher not in ("cached", "online"):
            raise ConfigError("utterance_seconds must be above 0, and teacher cached or online.")
