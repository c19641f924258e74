"""Whisper's own decoder behind a frozen encoder: it writes text, and is taught transcripts.

Letters: B utterances or windows of at most 30 s, T encoder frames, D Whisper's width, N tokens, Q prompt tokens, S
frames of silence.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoderLayer

from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.io.transfer import to_device
from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.imitation import imitation_loss
from nemo_mtbi.losses.objective import CROSS_ENTROPY
from nemo_mtbi.losses.risk import expected_risk
from nemo_mtbi.modules.connectors.base import Hypotheses, SpeechEmbeddings, evaluation_mode, frame_mask, mask_spans
from nemo_mtbi.modules.connectors.token import TokenConnector

FRAMES_PER_SECOND = 50
STEPS_BETWEEN_LOOKS = 8  # of a GPU's decoding, at whether all rows have ended


class WhisperRecognizer(TokenConnector):
    """Whisper's decoder, trained on; what the LLM reads of its text is up to
    :class:`nemo_mtbi.modules.connectors.whisper_decoder.WhisperDecoderConnector`.

    It reads the audio's own frames, without the silence that fills Whisper's 30 s. The decoder ends a text by looking
    at the last frames of that silence, so a few such frames (``silence``) stand beside every window; without them it
    loops.

    Text is written of a clean encoding in evaluation mode, in training as in use; dropout and time masks belong to the
    transcription loss alone.

    Args:
        decoder: fields of ``transformers.WhisperConfig``.
        prompt_ids: tokens that every window begins with (start, language, task, no timestamps).
        eos_id: end of text; tokens above it are special and never emitted.
        tokenizer_bytes: size of Whisper's tokenizer.json, which is kept among the weights (``tokenizer_json``).
        encoder_layers: upper layers of the encoder that the connector has as its own and trains; the frozen encoder
            keeps the others (``perception.encoder_layers``).
        suppress_ids: tokens that are never emitted; ``begin_suppress_ids``: not as the first token.
        language: of a multilingual Whisper (``en``); None for English-only ones.
        dropout: in the decoder, and in the encoder's upper layers, for the transcription loss.
        time_masks, time_mask_frames: as in the CTC connector, for the transcription loss.
        max_tokens_per_second: of speech, plus 8; ends a decoder that loops.
        silence_frames: S, of the end of a silent 30 s window, kept among the weights.
        no_speech_id: Whisper's token for a window without speech, predicted in the place after the first token; None:
            no window is taken for one.
        no_speech_threshold: probability of that token above which nothing is written.
    """

    tokenizer_json: Tensor
    silence: Tensor
    suppressed: Tensor

    def __init__(
        self,
        decoder: dict[str, Any],
        prompt_ids: list[int],
        eos_id: int,
        tokenizer_bytes: int,
        encoder_layers: int = 0,
        suppress_ids: Iterable[int] = (),
        begin_suppress_ids: Iterable[int] = (),
        language: str | None = None,
        dropout: float = 0.1,
        time_masks: int = 0,
        time_mask_frames: int = 20,
        max_tokens_per_second: float = 25.0,
        silence_frames: int = 0,
        no_speech_id: int | None = None,
        no_speech_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        config = WhisperConfig(**decoder, dropout=dropout)
        self.width, self.language = config.d_model, language
        self.time_masks, self.time_mask_frames = time_masks, time_mask_frames
        self.max_tokens_per_second = max_tokens_per_second
        self.prompt_ids, self.eos_id = list(prompt_ids), eos_id
        self.no_speech_id, self.no_speech_threshold = no_speech_id, no_speech_threshold
        self.max_tokens = config.max_target_positions - len(self.prompt_ids)
        self.encoder_layers = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(encoder_layers))
        self.encoder_norm = nn.LayerNorm(config.d_model) if encoder_layers else nn.Identity()
        self.decoder = WhisperDecoder(config)
        self.decoder.embed_tokens.weight.requires_grad_(False)  # a few hours of transcripts hold few of its tokens
        self.register_buffer("tokenizer_json", torch.zeros(tokenizer_bytes, dtype=torch.uint8))
        self.register_buffer("silence", torch.zeros(silence_frames, config.d_model))
        suppressed = torch.zeros(2, eos_id + 1)
        suppressed[:, [i for i in suppress_ids if i < eos_id]] = -torch.inf
        suppressed[0, [i for i in begin_suppress_ids if i <= eos_id]] = -torch.inf
        self.register_buffer("suppressed", suppressed, persistent=False)  # rows: first token, later ones
        self._tokenizer: Any = None

    def set_tokenizer(self, json: str) -> None:
        """Keep Whisper's tokenizer.json."""
        self.tokenizer_json.copy_(torch.frombuffer(bytearray(json.encode()), dtype=torch.uint8))
        self._tokenizer = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.upgrade_state(state_dict, prefix)
        for name in ("tokenizer_json", "silence"):  # other sizes: of another version of tokenizers, or none
            given, own = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if given is not None and given.shape != own.shape:
                setattr(self, name, torch.zeros_like(given, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def tokenizer(self) -> Any:
        """Whisper's tokenizer (``tokenizers.Tokenizer``)."""
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(bytes(self.tokenizer_json.tolist()).decode())
            self._tokenizer.encode_special_tokens = True  # transcripts are text
        return self._tokenizer

    def upgrade_state(self, state: dict[str, Any], prefix: str) -> None:
        """Weights of November 2026 may have no silence."""
        if f"{prefix}decoder.layer_norm.weight" in state and f"{prefix}silence" not in state:
            state[f"{prefix}silence"] = self.silence[:0]

    def transcript_tokens(self, transcripts: list[str], alone: list[bool] | None = None) -> int:
        ids = self._transcript_ids(transcripts)
        learned = [own for own, fits in zip(ids, self._learned(ids, alone), strict=True) if fits]
        return sum(map(len, learned)) + (0 if self.no_speech_id is None else len(learned))

    def _learned(self, ids: list[list[int]], alone: list[bool] | None) -> list[bool]:
        """Which utterances the transcription loss learns from: those of one window whose text the decoder can hold."""
        fits = [len(own) <= self.max_tokens and (len(own) > 0 or self.no_speech_id is not None) for own in ids]
        return fits if alone is None else [fit and one for fit, one in zip(fits, alone, strict=True)]

    def _transcript_ids(self, transcripts: list[str]) -> list[list[int]]:
        """Whisper's tokens of transcripts, end of text included; none where nothing is said."""
        texts = [" " + t.strip() for t in transcripts]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [[*own.ids, self.eos_id] if t.strip() else [] for t, own in zip(transcripts, encoded, strict=True)]

    def transcription_loss(
        self,
        speech: SpeechEmbeddings | None,
        features: Tensor,
        lengths: Tensor,
        transcripts: list[str],
        windows: Windows | None = None,
    ) -> tuple[Tensor, int]:
        """Cross-entropy of the transcripts under teacher forcing, and of whether anything is said.

        Utterances of several windows contribute nothing. The frames are encoded anew, with time masks and dropout
        where the connector is trained.
        """
        ids = self._transcript_ids(transcripts)
        if windows is not None:
            features, lengths = features[windows.firsts], lengths[windows.firsts]
        learned = self._learned(ids, None if windows is None else windows.alone)
        kept = [row for row, fits in enumerate(learned) if fits]
        if not kept:
            trained = [p.sum() for p in self.parameters() if p.requires_grad]  # a graph: other ranks' step goes on
            return (torch.stack(trained).sum() if trained else features.new_zeros(())) * 0.0, 0
        features, sizes = features[kept], lengths[kept]
        if self.training:
            features = mask_spans(features, sizes, self.time_masks, self.time_mask_frames)
        features, frames = self._encode(features, sizes)
        targets = [ids[i] for i in kept]
        hidden = self._forced(features, frames, [own[:-1] for own in targets])
        states = hidden[:, len(self.prompt_ids) - 1 :]
        flat = to_device([token for own in targets for token in own], features.device, torch.long)
        counts = to_device([len(own) for own in targets], features.device)
        rows = states[frame_mask(counts, states.shape[1])]
        loss = imitation_loss(rows, Head(self._output_weight()), flat, CROSS_ENTROPY).loss if len(flat) else 0.0
        if self.no_speech_id is None:
            return torch.as_tensor(loss), len(flat)
        nothing, something = self._no_speech_log_probs(hidden[:, 0])
        return loss - torch.where(counts == 0, nothing, something).sum(), len(flat) + len(kept)

    def _writing_weights(self) -> list[nn.Parameter]:
        """What decides a text."""
        parts = (self.encoder_layers, self.encoder_norm, self.decoder)
        return [parameter for part in parts for parameter in part.parameters()]

    @property
    def learns_transcripts(self) -> bool:
        return self.learns_by_risk

    @property
    def learns_by_risk(self) -> bool:
        return any(weight.requires_grad for weight in self._writing_weights())

    @torch.no_grad()
    def writing_key(self) -> str | None:
        """The weights (as bfloat16, so that any precision of them has one key) and settings that decide a text."""
        weights = self._writing_weights()
        if any(weight.requires_grad for weight in weights):
            return None
        no_speech = (self.no_speech_id, self.no_speech_threshold)
        # Not the values of the silence, which each processor computes a little differently.
        settings = (self.prompt_ids, self.max_tokens_per_second, *no_speech, len(self.silence))
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=12)
        for tensor in (self.suppressed, *weights):
            digest.update(tensor.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def write(self, features: Tensor, lengths: Tensor) -> list[list[int]]:
        """features (B, T, D), lengths (B,) -> greedy tokens."""
        with evaluation_mode(self):
            return self._write(*self._encode(features, lengths))[0]

    def transcribe(self, features: Tensor, lengths: Tensor, written: list[list[int]] | None = None) -> list[str]:
        tokens = self.write(features, lengths) if written is None else written
        return [self.tokenizer.decode(own).strip() for own in tokens]

    def _output_weight(self) -> Tensor:
        return self.decoder.embed_tokens.weight[: self.eos_id + 1]

    def _encode(self, features: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder reads, (B, S + T, D) and (B,) frames: silence, and the last D features through the encoder's
        upper layers where they are the connector's. (Attention knows a frame's place from the frame alone.)
        """
        features = features[..., -self.width :]
        if len(self.silence):
            silence = self.silence.to(features.dtype).expand(len(features), -1, -1)
            features, sizes = torch.cat([silence, features], 1), sizes + len(self.silence)
        mask = self._frame_mask(sizes, features.shape[1]) if self.encoder_layers else None
        for layer in self.encoder_layers:
            features = layer(features, mask)
        return self.encoder_norm(features), sizes

    def _step(
        self, ids: Tensor, begin: int, features: Tensor, mask: Tensor | None, cache: EncoderDecoderCache | None
    ) -> Tensor:
        """Last hidden states (B, n, D) of tokens (B, n) that stand from position ``begin`` on."""
        decoder = self.decoder
        hidden = decoder.embed_tokens(ids) + decoder.embed_positions.weight[begin : begin + ids.shape[1]]
        hidden = nn.functional.dropout(hidden, decoder.dropout, decoder.training)
        for layer in decoder.layers:
            # Transformers' own forward has no mask over padded frames. By position: the cache's name changes with
            # versions.
            hidden = layer(hidden, None, features, mask, cache, cache is not None)
        return decoder.layer_norm(hidden)

    def _frame_mask(self, sizes: Tensor, frames: int) -> Tensor | None:
        """(B, 1, 1, T) additive, or None where nothing is padded, as far as the CPU knows."""
        valid = frame_mask(sizes, frames)
        if valid.device.type == "cpu" and bool(valid.all()):  # elsewhere, the CPU would wait for the answer
            return None
        zeros = torch.zeros(valid.shape, dtype=self.decoder.layer_norm.weight.dtype, device=valid.device)
        return zeros.masked_fill(~valid, torch.finfo(zeros.dtype).min)[:, None, None]

    def _no_speech_log_probs(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B,) of no speech and of all else, from the states (B, D) of the first token."""
        logits = nn.functional.linear(first, self.decoder.embed_tokens.weight).float()
        total, nothing = logits.logsumexp(-1), torch.zeros_like(logits[0], dtype=torch.bool)
        nothing[self.no_speech_id] = True  # the rest by itself: 1 - p would be 0 for a sure p, and teach nothing
        return logits[:, self.no_speech_id] - total, logits.masked_fill(nothing, -torch.inf).logsumexp(-1) - total

    def _forced_states(self, features: Tensor, sizes: Tensor, tokens: list[list[int]]) -> Tensor:
        """States (B, N + 1, D) that predict each token and what follows the last one."""
        return self._forced(features, sizes, tokens)[:, len(self.prompt_ids) - 1 :]

    def _forced(self, features: Tensor, sizes: Tensor, tokens: list[list[int]]) -> Tensor:
        """States (B, Q + N, D) of Q prompt tokens and N tokens."""
        width = max(map(len, tokens))
        ids = torch.tensor([self.prompt_ids + own + [self.eos_id] * (width - len(own)) for own in tokens])
        mask = self._frame_mask(sizes, features.shape[1])
        return self._step(to_device(ids, features.device), 0, features, mask, None)

    @torch.no_grad()
    def _write(
        self, features: Tensor, sizes: Tensor, temperature: float | None = None
    ) -> tuple[list[list[int]], Tensor]:
        """Tokens of each row, and the states (B, N + 1, D) that predicted them and the end. In evaluation mode.

        The most likely tokens; with a temperature, sampled ones.
        """
        mask = self._frame_mask(sizes, features.shape[1])
        seconds = (sizes - len(self.silence)).float() / FRAMES_PER_SECOND
        limits = (seconds * self.max_tokens_per_second).ceil().long().add(8).clamp_max(self.max_tokens - 1)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = to_device(self.prompt_ids, features.device).expand(len(sizes), -1)
        begin = 0
        written: list[Tensor] = []
        states: list[Tensor] = []
        done = torch.zeros(len(sizes), dtype=torch.bool, device=features.device)
        while True:
            step = self._step(ids, begin, features, mask, cache)
            if self.no_speech_id is not None and not states:
                nothing = self._no_speech_log_probs(step[:, 0])[0] > math.log(self.no_speech_threshold)
                done |= self.agreed(nothing.long()).bool()
            hidden = step[:, -1]
            states.append(hidden)
            begin += ids.shape[1]
            logits = nn.functional.linear(hidden, self._output_weight()).float()
            logits = logits + self.suppressed[0 if len(states) == 1 else 1]
            if temperature is None:
                chosen = logits.argmax(-1)
            else:
                chosen = (logits / temperature).softmax(-1).multinomial(1)[:, 0]
            best = self.agreed(chosen)
            done |= (best == self.eos_id) | (limits <= len(states) - 1)
            # On a GPU, a few steps too many cost less than waiting for each; all tokens after a row's end are ends.
            every = 1 if done.device.type == "cpu" else STEPS_BETWEEN_LOOKS
            if (len(states) % every == 0 or len(states) >= self.max_tokens) and bool(done.all()):
                break
            ids = best.masked_fill(done, self.eos_id)[:, None]
            written.append(ids)
        rows = torch.cat(written, 1).tolist() if written else [[] for _ in sizes]
        return [own[: own.index(self.eos_id)] if self.eos_id in own else own for own in rows], torch.stack(states, 1)

    def risk_loss(self, features: Tensor, lengths: Tensor, hypotheses: Hypotheses, risks: Tensor) -> Tensor:
        head, device, first = Head(self._output_weight()), features.device, hypotheses.first_alike()
        # An utterance of one text teaches nothing (its slopes are 0), and a text that was drawn twice is read once.
        taught = [row for row in range(len(lengths)) if any(reading[row] for reading in first)] or [0]
        texts = [(s, row) for s, reading in enumerate(first) for row in taught if reading[row] == s]
        place = {text: number for number, text in enumerate(texts)}
        drawn = to_device([[place[reading[row], row] for reading in first] for row in taught], device)  # (B', S)
        targets = [[*hypotheses.tokens[s][row], self.eos_id] for s, row in texts]
        rows = to_device(taught, device)
        with evaluation_mode(self):
            encoded, heard = self._encode(features[rows], lengths[rows])
            own = to_device([taught.index(row) for _, row in texts], device)
            states = self._forced_states(encoded[own], heard[own], [target[:-1] for target in targets])
        counts = to_device([len(target) for target in targets], device)
        hidden = states[frame_mask(counts, states.shape[1])]
        ids = to_device([token for target in targets for token in target], device)
        owner = torch.arange(len(targets), device=device).repeat_interleave(counts, output_size=len(ids))
        with torch.no_grad():
            losses = imitation_loss(hidden.detach(), head, ids, CROSS_ENTROPY).per_token
            log_probs = -losses.new_zeros(len(targets)).index_add(0, owner, losses)
            expected = risks.float().mean(1)  # of those that are left out, the risk of their text
            expected[rows], slopes = expected_risk(log_probs[drawn], risks[rows])
            weights = -losses.new_zeros(len(targets)).index_add(0, drawn.flatten(), slopes.flatten())[owner]
        # The expected risk has the gradient of its log-probabilities weighted by their slopes.
        weighted = imitation_loss(hidden, head, ids, CROSS_ENTROPY, token_weights=weights).loss
        return weighted + (expected.sum() - weighted).detach()
