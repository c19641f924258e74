"""A connector that is Whisper's own decoder: it reads the frozen encoder's frames and writes the LLM's tokens.

Letters: B utterances or windows of at most 30 s, T encoder frames, D Whisper's width, N tokens, P output positions, H
LLM width.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoderLayer

from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.data.messages import NOTHING_HEARD
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.transfer import all_to_device, to_device
from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.imitation import imitation_loss
from nemo_mtbi.losses.objective import CROSS_ENTROPY
from nemo_mtbi.losses.risk import expected_risk
from nemo_mtbi.modules.connectors.base import Hypotheses, SpeechEmbeddings, evaluation_mode, frame_mask, mask_spans
from nemo_mtbi.modules.connectors.token import TokenConnector

FRAMES_PER_SECOND = 50
STEPS_BETWEEN_LOOKS = 8  # of a GPU's decoding, at whether all rows have ended
OLD_RESIDUAL_SCALE = 5.0


class WhisperDecoderConnector(TokenConnector):
    """Whisper's decoder, trained on, whose greedy tokens become the LLM's.

    The decoder's text is cut into the LLM's tokens. The embedding of token j, whose last byte Whisper's token i
    wrote, is::

        E_j  +  soft_i - stopgrad(soft_i)  +  rms(E) residual(norm(h_i)),     soft_i = sum_k p_ik M_k

    with ``h_i`` the decoder's last hidden state that predicted token i, ``p_i`` its ``alternatives`` most likely tokens
    (renormalized) and ``M_k`` the LLM's mean embedding of Whisper's token k. The middle is zero in the forward pass
    (straight-through, Bengio et al. 2013): it carries the LLM's gradient to the choice of tokens. ``residual`` starts
    at zero: the LLM of an untrained connector reads the text that Whisper's decoder writes from these frames. They are
    the audio's own, without the silence that fills Whisper's 30 s; the decoder ends a text by looking at the last
    frames of that silence, so a few such frames (``silence``) stand beside every window. Without them it loops.
    Transcripts teach the decoder too (:meth:`transcription_loss`).

    Tokens and states come from a clean encoding in evaluation mode, in training as in use; dropout and time masks
    belong to the transcription loss alone.

    Args:
        feat_in: D, must be Whisper's own width.
        output_dim: H, LLM width.
        decoder: fields of ``transformers.WhisperConfig``.
        encoder_layers: upper layers of the encoder that the connector has as its own and trains; the frozen encoder
            keeps the others (``perception.encoder_layers``).
        prompt_ids: tokens that every window begins with (start, language, task, no timestamps).
        eos_id: end of text; tokens above it are special and never emitted.
        suppress_ids: tokens that are never emitted; ``begin_suppress_ids``: not as the first token.
        tokenizer_bytes: size of Whisper's tokenizer.json, which is kept among the weights (``tokenizer_json``).
        language: of a multilingual Whisper (``en``); None for English-only ones.
        alternatives: 0 leaves the straight-through term out. Off by default: alone it does not teach recognition
            (see docs/training.md).
        dropout: in the decoder, and in the encoder's upper layers, for the transcription loss.
        time_masks, time_mask_frames: as in the CTC connector, for the transcription loss.
        residual_scale: factor on the residual, for weights that were trained with one; a parameter group sets its
            learning rate (``model.parameter_groups``).
        max_tokens_per_second: of speech, plus 8; ends a decoder that loops.
        no_speech_id: Whisper's token for a window without speech, predicted in the place after the first token; None:
            no window is taken for one.
        no_speech_threshold: probability of that token above which nothing is written.
        silence_frames: S, of the end of a silent 30 s window, kept among the weights.

    Raises:
        ConfigError: the encoder is not that Whisper's.
    """

    tokenizer_json: Tensor
    silence: Tensor
    embedding_rms: Tensor
    suppressed: Tensor
    piece_embeddings: Tensor

    def __init__(
        self,
        feat_in: int,
        output_dim: int,
        decoder: dict[str, Any],
        prompt_ids: list[int],
        eos_id: int,
        tokenizer_bytes: int,
        encoder_layers: int = 0,
        suppress_ids: Iterable[int] = (),
        begin_suppress_ids: Iterable[int] = (),
        language: str | None = None,
        alternatives: int = 0,
        dropout: float = 0.1,
        time_masks: int = 0,
        time_mask_frames: int = 20,
        residual_scale: float = 1.0,
        max_tokens_per_second: float = 25.0,
        silence_frames: int = 0,
        no_speech_id: int | None = None,
        no_speech_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        config = WhisperConfig(**decoder, dropout=dropout)
        if feat_in != config.d_model:
            raise ConfigError(f"The encoder's width is {feat_in}, that of this Whisper decoder {config.d_model}.")
        self.width, self.language, self.alternatives = config.d_model, language, alternatives
        self.time_masks, self.time_mask_frames = time_masks, time_mask_frames
        self.residual_scale, self.max_tokens_per_second = residual_scale, max_tokens_per_second
        self.prompt_ids, self.eos_id = list(prompt_ids), eos_id
        self.no_speech_id, self.no_speech_threshold = no_speech_id, no_speech_threshold
        self.max_tokens = config.max_target_positions - len(self.prompt_ids)
        self.encoder_layers = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(encoder_layers))
        self.encoder_norm = nn.LayerNorm(config.d_model) if encoder_layers else nn.Identity()
        self.decoder = WhisperDecoder(config)
        self.decoder.embed_tokens.weight.requires_grad_(False)  # a few hours of transcripts hold few of its tokens
        self.norm = nn.LayerNorm(config.d_model)
        self.residual = nn.Linear(config.d_model, output_dim)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)
        self.register_buffer("tokenizer_json", torch.zeros(tokenizer_bytes, dtype=torch.uint8))
        self.register_buffer("silence", torch.zeros(silence_frames, config.d_model))
        self.register_buffer("embedding_rms", torch.ones(()), persistent=False)
        pieces = eos_id + 1 if alternatives else 0
        self.register_buffer("piece_embeddings", torch.zeros(pieces, output_dim), persistent=False)
        suppressed = torch.zeros(2, eos_id + 1)
        suppressed[:, [i for i in suppress_ids if i < eos_id]] = -torch.inf
        suppressed[0, [i for i in begin_suppress_ids if i <= eos_id]] = -torch.inf
        self.register_buffer("suppressed", suppressed, persistent=False)  # rows: first token, later ones
        self._tokenizer: Any = None
        self._language_model: tuple[Any, Any] | None = None

    # -- set-up ---------------------------------------------------------------------------------------------------

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

    @torch.no_grad()
    def bind_language_model(self, tokenizer: Any, embed_tokens: nn.Module) -> None:
        self._tokenizer = None  # the buffer may just have been loaded
        self._language_model = (tokenizer, embed_tokens)  # in a tuple: not a submodule
        weight = next(embed_tokens.parameters())
        if weight.is_meta or not self.tokenizer_json.any():  # a shard, or our own weights, that are not read yet
            return
        every = max(1, tokenizer.vocab_size // 4096)
        sample = embed_tokens(torch.arange(0, tokenizer.vocab_size, every, device=weight.device))
        self.embedding_rms.copy_(sample.float().square().mean().sqrt().clamp_min(1e-6))
        if self.alternatives:
            self.piece_embeddings = self._mean_embeddings(tokenizer, embed_tokens, weight.device).to(weight.dtype)

    def _mean_embeddings(self, tokenizer: Any, embed_tokens: nn.Module, device: torch.device) -> Tensor:
        """The LLM's mean embedding (eos + 1, H) of the text of each of Whisper's tokens; zero for the end of text."""
        texts = self.tokenizer.decode_batch([[i] for i in range(self.eos_id)], skip_special_tokens=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = torch.tensor([row for row, own in enumerate(ids) for _ in own], device=device)
        tokens = torch.tensor([i for own in ids for i in own], device=device)
        result = torch.zeros(self.piece_embeddings.shape, device=device)
        counts = result.new_zeros(len(result)).index_add(0, rows, torch.ones_like(rows, dtype=result.dtype))
        for begin in range(0, len(rows), 8192):
            part = slice(begin, begin + 8192)
            result.index_add_(0, rows[part], embed_tokens(tokens[part]).float())
        return result / counts.clamp_min(1)[:, None]

    @torch.no_grad()
    def upgrade_state(self, state: dict[str, Any], prefix: str) -> None:
        """Weights of November 2026 may have no silence, or a gate, which is left out, and a residual in other units."""
        if f"{prefix}decoder.layer_norm.weight" in state and f"{prefix}silence" not in state:
            state[f"{prefix}silence"] = self.silence[:0]
        if state.pop(f"{prefix}gate", None) is None:
            return
        for name in ("weight", "bias"):
            key = f"{prefix}residual.{name}"
            state[key] = state[key] * (OLD_RESIDUAL_SCALE / self.residual_scale)

    def labels_of(self, tokens: Iterable[int]) -> list[int]:
        return list(tokens)

    # -- transcription --------------------------------------------------------------------------------------------

    def transcript_tokens(self, transcripts: list[str]) -> int:
        return sum(map(len, self._transcript_ids(transcripts))) + self._decisions(transcripts)

    def _transcript_ids(self, transcripts: list[str]) -> list[list[int]]:
        """Whisper's tokens of transcripts, end of text included; none where nothing is said."""
        texts = [" " + t.strip() for t in transcripts]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [[*own.ids, self.eos_id] if t.strip() else [] for t, own in zip(transcripts, encoded, strict=True)]

    def _decisions(self, transcripts: list[str]) -> int:
        """Utterances for which it is learned whether anything is said."""
        return 0 if self.no_speech_id is None else len(transcripts)

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
        fits = [len(own) <= self.max_tokens and (len(own) > 0 or self.no_speech_id is not None) for own in ids]
        if windows is not None:
            features, lengths = features[windows.firsts], lengths[windows.firsts]
            fits = [fit and alone for fit, alone in zip(fits, windows.alone, strict=True)]
        kept = [row for row, fit in enumerate(fits) if fit]
        if not kept:
            trained = [p.sum() for p in self.parameters() if p.requires_grad]
            return torch.stack(trained).sum() * 0.0, 0  # with a graph: the step of the other ranks goes on
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
        nothing = self._no_speech_log_probs(hidden[:, 0])
        something = torch.log(-torch.expm1(nothing.clamp_max(-1e-6)))
        return loss - torch.where(counts == 0, nothing, something).sum(), len(flat) + len(kept)

    @torch.no_grad()
    def transcribe(self, features: Tensor, lengths: Tensor) -> list[str]:
        """features (B, T, D), lengths (B,) -> greedy transcripts."""
        with evaluation_mode(self):
            tokens, _ = self._write(*self._encode(features, lengths))
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
        zeros = torch.zeros(valid.shape, dtype=self.norm.weight.dtype, device=valid.device)
        return zeros.masked_fill(~valid, torch.finfo(zeros.dtype).min)[:, None, None]

    def _no_speech_log_probs(self, first: Tensor) -> Tensor:
        """Log-probability (B,) of no speech, from the states (B, D) of the first token."""
        logits = nn.functional.linear(first, self.decoder.embed_tokens.weight).float()
        return logits[:, self.no_speech_id] - logits.logsumexp(-1)

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
                nothing = self._no_speech_log_probs(step[:, 0]) > math.log(self.no_speech_threshold)
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

    # -- connector ------------------------------------------------------------------------------------------------

    def connect(self, features: Tensor, lengths: Tensor, starts: list[bool] | None = None) -> SpeechEmbeddings:
        with evaluation_mode(self):
            encoded, heard = self._encode(features, lengths)
            tokens, states = self._write(encoded, heard)
            if torch.is_grad_enabled():
                states = self._forced_states(encoded, heard, tokens)
        return self._read(tokens, states, lengths, starts)

    def _read(
        self, tokens: list[list[int]], states: Tensor, lengths: Tensor, starts: list[bool] | None
    ) -> SpeechEmbeddings:
        """What the LLM reads of the text of B rows.

        Args:
            tokens: Whisper's, of each row.
            states: (B, N + 1, D) that predicted them.
            lengths: (B,) frames.
            starts: as in :meth:`connect`.
        """
        assert self._language_model is not None
        tokenizer, embed_tokens = self._language_model
        device = states.device
        rows: list[list[tuple[int, int, float]]] = []  # LLM token, place of the Whisper token, center
        for own, frames, start in zip(tokens, lengths.tolist(), starts or [True] * len(tokens), strict=True):
            written = self._language_model_tokens(tokenizer, own, start)
            rows.append([(token, index, (index + 0.5) / max(1, len(own)) * frames) for token, index in written])
        about = [[float(not row)] for row in rows]
        for row, note in zip(rows, about, strict=True):
            if not row:
                row += [(t, 0, 0.0) for t in tokenizer(NOTHING_HEARD, add_special_tokens=False)["input_ids"]]
            note.append(len(row))
        width = max(map(len, rows))
        flat = [(b * width + p, b, *own) for b, row in enumerate(rows) for p, own in enumerate(row)]
        numbers = [torch.tensor(own, dtype=torch.float64) for own in (flat, about)]
        (*parts, centers), (nothing, counts) = (t.unbind(1) for t in all_to_device(numbers, device))
        at, utterance, token, index = (part.long() for part in parts)

        def padded(values: Tensor) -> Tensor:
            whole = values.new_zeros(len(rows) * width, *values.shape[1:])
            return whole.index_copy(0, at, values).unflatten(0, (len(rows), width))

        chosen = states[utterance, index]
        extra = self.residual(self.norm(chosen)) * (self.residual_scale * self.embedding_rms)
        if self.alternatives and torch.is_grad_enabled():
            soft = self._likely_embeddings(chosen, index == 0)
            extra = extra + (soft - soft.detach())
        embeddings = padded(embed_tokens(token).to(extra.dtype) + extra)
        return SpeechEmbeddings(
            embeddings, counts.long(), padded(centers.float()), labels=padded(token), nothing_heard=nothing.bool()
        )

    def fusable(self, speech: SpeechEmbeddings) -> Tensor | None:
        """None of them: they are the LLM's own tokens."""
        return torch.zeros_like(speech.centers, dtype=torch.bool)

    @torch.no_grad()
    def hypotheses(
        self, features: Tensor, lengths: Tensor, count: int, temperature: float, starts: list[bool] | None = None
    ) -> Hypotheses:
        tokens, speech = [], []
        with evaluation_mode(self):
            encoded, heard = self._encode(features, lengths)
            for index in range(count):
                written, states = self._write(encoded, heard, temperature if index else None)
                tokens.append(written)
                speech.append(self._read(written, states, lengths, starts))
        return Hypotheses(tokens, speech)

    def risk_loss(self, features: Tensor, lengths: Tensor, hypotheses: Hypotheses, risks: Tensor) -> Tensor:
        head, repeats = Head(self._output_weight()), len(hypotheses.tokens)
        targets = [[*own, self.eos_id] for sample in hypotheses.tokens for own in sample]  # (S, B)
        with evaluation_mode(self):
            encoded, heard = self._encode(features, lengths)
            states = self._forced_states(
                encoded.repeat(repeats, 1, 1), heard.repeat(repeats), [own[:-1] for own in targets]
            )
        counts = torch.tensor([len(own) for own in targets], device=features.device)
        rows = states[frame_mask(counts, states.shape[1])]
        ids = torch.tensor([token for own in targets for token in own], device=features.device)
        owner = torch.arange(len(targets), device=features.device).repeat_interleave(counts)
        with torch.no_grad():
            losses = imitation_loss(rows.detach(), head, ids, CROSS_ENTROPY).per_token
            log_probs = -losses.new_zeros(len(targets)).index_add(0, owner, losses)
            expected, slopes = expected_risk(log_probs.unflatten(0, (repeats, -1)).t(), risks)
            weights = -slopes.t().flatten()[owner]
        # The expected risk has the gradient of its log-probabilities weighted by their slopes.
        weighted = imitation_loss(rows, head, ids, CROSS_ENTROPY, token_weights=weights).loss
        return weighted + (expected.sum() - weighted).detach()

    def _likely_embeddings(self, states: Tensor, first: Tensor) -> Tensor:
        """Mean LLM embedding (R, H) of the likely tokens, weighted by their probabilities.

        Args:
            states: (R, D) that predicted the tokens.
            first: (R,) whether a token begins its window.
        """
        weight = self._output_weight()
        size = max(1, 2**24 // len(weight))
        with torch.no_grad():
            best = torch.cat(
                [
                    (nn.functional.linear(part, weight) + self.suppressed[(~begins).long()])
                    .topk(self.alternatives)
                    .indices
                    for part, begins in zip(states.split(size), first.split(size), strict=True)
                ]
            )
        logits = torch.einsum("rd,rkd->rk", states.to(weight.dtype), weight[best]).float()
        table = self.piece_embeddings
        # A bag: no (R, K, H) tensor.
        weights = logits.softmax(-1).to(table.dtype)
        return nn.functional.embedding_bag(best, table, mode="sum", per_sample_weights=weights).float()

    def _language_model_tokens(self, tokenizer: Any, tokens: list[int], first: bool) -> list[tuple[int, int]]:
        """The LLM's tokens of a window's text, each with the index of the Whisper token that wrote its last byte."""
        text = self.tokenizer.decode(tokens)
        lead = len(text) - len(text.lstrip())
        text = text.strip()
        if not text:
            return []
        # One character of a byte-level piece is one byte of the text.
        ends, position = [], 0
        for token in tokens:
            position += len(self.tokenizer.id_to_token(token))
            ends.append(position)
        joint = text if first else " " + text  # a further window of the same utterance
        shift = lead - (0 if first else 1)
        result = []
        for token, (_, end) in zip(*literal_encoding(tokenizer, joint), strict=True):
            byte = len(joint[:end].encode()) + shift
            result.append((token, min(bisect_left(ends, byte), len(tokens) - 1)))
        return result
