"""Whisper's encoder as parts of NeMo's ``AudioPerceptionModule`` (preprocessor and encoder, chosen by ``_target_``).

Letters: B utterances, S samples, M mel bins, F mel frames (10 ms), T encoder frames (20 ms), D encoder width.
"""

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder as HFWhisperEncoder

from nemo_mtbi.data.audio_windows import WINDOW_SECONDS
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io.transfer import to_device

SAMPLE_RATE, N_FFT, HOP_SAMPLES = 16_000, 400, 160
WINDOW_FRAMES = WINDOW_SECONDS * SAMPLE_RATE // HOP_SAMPLES
SUBSAMPLING = 2
PASS_FRAMES = 32 * WINDOW_FRAMES  # mel frames that are encoded together


class WindowPolicy:
    """How much silence follows the speech before it enters the encoder; the encoder attends to it, so it matters.

    Args:
        input_length: ``trained`` pads all audio to 30 s, as Whisper was trained. ``own`` pads to the audio's own
            length rounded up to ``round_seconds``: several times cheaper; its features differ, and serve a connector
            that was trained on them. The setting is part of the encoder's configuration and of the feature cache's key.
        round_seconds: granularity of ``own``.

    Raises:
        ConfigError: another name, or a granularity outside (0, 30].
    """

    def __init__(self, input_length: str, round_seconds: float) -> None:
        if input_length not in ("trained", "own"):
            raise ConfigError(f"input_length={input_length!r}: use 'trained' (30 s windows) or 'own'.")
        if not 0 < round_seconds <= 30:
            raise ConfigError(f"round_seconds={round_seconds} must lie in (0, 30].")
        frames = math.ceil(round_seconds * SAMPLE_RATE / HOP_SAMPLES)
        self.multiple = WINDOW_FRAMES if input_length == "trained" else min(WINDOW_FRAMES, frames + frames % 2)

    def padded_frames(self, frames: int) -> int:
        """Mel frames with the silence.

        Raises:
            DataError: over 30 s; :mod:`nemo_mtbi.data.audio_windows` cuts longer audio.
        """
        if frames > WINDOW_FRAMES:
            raise DataError(
                f"Whisper's encoder takes up to {WINDOW_SECONDS} s at once, not {frames * HOP_SAMPLES / SAMPLE_RATE:g}."
            )
        return min(WINDOW_FRAMES, max(1, math.ceil(frames / self.multiple)) * self.multiple)


def passes(jobs: dict[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
    """Rows of equal padded length in groups of at most PASS_FRAMES mel frames."""
    for padded, group in jobs.items():
        size = max(1, PASS_FRAMES // padded)
        for begin in range(0, len(group), size):
            yield padded, group[begin : begin + size]


class WhisperPreprocessor(nn.Module):
    """Log-mel features of Whisper (openai/whisper ``audio.py``), batched, independent of the batch's padding."""

    takes_lengths_on_cpu = True  # and the encoder too: both need them there
    filters: Tensor
    window: Tensor

    def __init__(self, num_mel_bins: int = 80, input_length: str = "trained", round_seconds: float = 2.0) -> None:
        super().__init__()
        self.policy = WindowPolicy(input_length, round_seconds)
        self.num_mel_bins = num_mel_bins
        self.register_buffer("filters", self._filters(), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)
        # What SALM asks of any NeMo preprocessor.
        self.featurizer = SimpleNamespace(
            sample_rate=SAMPLE_RATE, hop_length=HOP_SAMPLES, get_seq_len=lambda n: torch.ceil(n / HOP_SAMPLES).long()
        )

    def _filters(self) -> Tensor:
        filters = mel_filter_bank(
            1 + N_FFT // 2, self.num_mel_bins, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        return torch.from_numpy(filters).float()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Goes to a device with the model, and stays in fp32 there, whatever precision the model is given."""
        super()._apply(fn, recurse)
        if self.filters.dtype != torch.float32 and not self.filters.is_meta:
            self.filters = self._filters().to(self.filters.device)
            self.window = torch.hann_window(N_FFT, device=self.window.device)
        return self

    @torch.no_grad()
    def forward(self, input_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """input_signal (B, S), length (B,) samples -> log-mel (B, M, F) in fp32, also under autocast, and valid frames
        (B,), where ``length`` is.
        """
        with torch.autocast(input_signal.device.type, enabled=False):
            return self._log_mel(input_signal, length)

    def _log_mel(self, input_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        frames = ((length + HOP_SAMPLES - 1) // HOP_SAMPLES).clamp_min(1)
        padded = max(self.policy.padded_frames(n) for n in frames.tolist())
        signal, length = input_signal.float(), to_device(length, input_signal.device)
        signal = signal.masked_fill(torch.arange(signal.shape[1], device=signal.device) >= length[:, None], 0.0)
        # Zeros after the end stand in for Whisper's reflection there, so that a row never depends on its neighbours.
        tail = padded * HOP_SAMPLES + N_FFT // 2 - signal.shape[1]
        signal = nn.functional.pad(signal, (0, tail))
        head = signal[:, 1 : N_FFT // 2 + 1].flip(1)
        spectrum = torch.stft(
            torch.cat([head, signal], 1), N_FFT, HOP_SAMPLES, window=self.window, center=False, return_complex=True
        )
        power = spectrum[..., :padded].abs() ** 2
        log_mel = torch.einsum("fm,bft->bmt", self.filters, power).clamp_min(1e-10).log10()
        log_mel = torch.maximum(log_mel, log_mel.amax((1, 2), keepdim=True) - 8.0)
        return (log_mel + 4.0) / 4.0, frames


class WhisperEncoder(nn.Module):
    """Transformers' Whisper encoder under NeMo's encoder contract, at 30 s or at the audio's own length.

    Args:
        config: fields of ``transformers.WhisperConfig``.
        input_length, round_seconds: see :class:`WindowPolicy`; the same values as the preprocessor's.
        layers: lower layers that are kept, without the final normalization (a connector that has the upper ones as
            its own reads them); None for the whole encoder.
        taps: lower layers (1 is the first) whose outputs stand before the last one's on the feature axis, for a
            connector that reads several layers; ``d_model`` counts them.
    """

    subsampling_factor = SUBSAMPLING

    def __init__(
        self,
        config: dict[str, Any],
        input_length: str = "trained",
        round_seconds: float = 2.0,
        layers: int | None = None,
        taps: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.policy = WindowPolicy(input_length, round_seconds)
        self.config = WhisperConfig(**config)
        self.whisper = HFWhisperEncoder(self.config)
        if layers is not None:
            if not 0 <= layers <= self.config.encoder_layers:
                raise ConfigError(f"encoder_layers={layers}: this Whisper encoder has {self.config.encoder_layers}.")
            self.whisper.layers = self.whisper.layers[:layers]
            self.whisper.layer_norm = nn.Identity()  # type: ignore[assignment]
        depth = len(self.whisper.layers)
        if any(not 0 < tap < depth for tap in taps) or sorted(set(taps)) != list(taps):
            raise ConfigError(f"encoder_taps={list(taps)}: ascending layers from 1 to {depth - 1} of this encoder.")
        self.taps = frozenset(taps)
        self.d_model = self.config.d_model * (1 + len(self.taps))

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """audio_signal (B, M, F), length (B,) valid mel frames -> (B, D, T), valid encoder frames (B,)."""
        silence = audio_signal.amin((1, 2))
        frames = length.tolist()
        jobs: dict[int, list[int]] = {}  # padded frames -> rows
        for row, valid in enumerate(frames):
            jobs.setdefault(self.policy.padded_frames(valid), []).append(row)
        rows: list[Any] = [None] * len(frames)
        for padded, group in passes(jobs):
            mel = audio_signal[group, :, :padded]
            if (missing := padded - mel.shape[2]) > 0:
                mel = torch.cat([mel, silence[group, None, None].expand(-1, mel.shape[1], missing)], 2)
            for row, states in zip(group, self._encode(mel), strict=True):
                rows[row] = states[: math.ceil(frames[row] / SUBSAMPLING)]
        lengths = to_device([len(r) for r in rows], audio_signal.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2), lengths

    def _encode(self, mel: Tensor) -> Tensor:
        """(N, M, F) with any even F <= 3000 -> (N, F / 2, D); Transformers' own forward insists on F = 3000."""
        w = self.whisper
        hidden = nn.functional.gelu(w.conv1(mel.to(w.conv1.weight.dtype)))
        hidden = nn.functional.gelu(w.conv2(hidden)).transpose(1, 2)
        hidden = hidden + w.embed_positions.weight[: hidden.shape[1]]
        tapped = []
        for depth, layer in enumerate(w.layers, 1):
            hidden = layer(hidden, None)
            if depth in self.taps:
                tapped.append(hidden)
        return torch.cat([*tapped, w.layer_norm(hidden)], -1)
