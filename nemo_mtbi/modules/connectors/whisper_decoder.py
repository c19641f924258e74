"""A connector that is Whisper's own decoder: it reads the frozen encoder's frames and writes the LLM's tokens.

Letters: B utterances or windows of at most 30 s, T encoder frames, D Whisper's width, N tokens, P output positions, H
LLM width.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.data.messages import NOTHING_HEARD
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.text import UNSPACED, word_count
from nemo_mtbi.io.transfer import all_to_device
from nemo_mtbi.modules.connectors.base import Hypotheses, SpeechEmbeddings, computed_dtype, evaluation_mode
from nemo_mtbi.modules.connectors.whisper_recognizer import WhisperRecognizer

OLD_RESIDUAL_SCALE = 5.0


class WhisperDecoderConnector(WhisperRecognizer):
    """Whisper's decoder, trained on, whose greedy tokens become the LLM's.

    The decoder's text is cut into the LLM's tokens. The embedding of token j, whose last byte Whisper's token i
    wrote, is::

        E_j  +  soft_i - stopgrad(soft_i)  +  rms(E) residual(norm(h_i)),     soft_i = sum_k p_ik M_k

    with ``h_i`` the decoder's last hidden state that predicted token i, ``p_i`` its ``alternatives`` most likely tokens
    (renormalized) and ``M_k`` the LLM's mean embedding of Whisper's token k. The middle is zero in the forward pass
    (straight-through, Bengio et al. 2013): it carries the LLM's gradient to the choice of tokens. ``residual`` starts
    at zero: the LLM of an untrained connector reads the text that Whisper's decoder writes.

    Args:
        feat_in: D, must be Whisper's own width.
        output_dim: H, LLM width.
        decoder: fields of ``transformers.WhisperConfig``.
        alternatives: 0 leaves the straight-through term out. Off by default: alone it does not teach recognition
            (see docs/training.md).
        residual_scale: factor on the residual, for weights that were trained with one; a parameter group sets its
            learning rate (``model.parameter_groups``).
        recognizer: further arguments of :class:`nemo_mtbi.modules.connectors.whisper_recognizer.WhisperRecognizer`.

    Raises:
        ConfigError: the encoder is not that Whisper's.
    """

    embedding_rms: Tensor
    piece_embeddings: Tensor

    def __init__(
        self,
        feat_in: int,
        output_dim: int,
        decoder: dict[str, Any],
        alternatives: int = 0,
        residual_scale: float = 1.0,
        **recognizer: Any,
    ) -> None:
        super().__init__(decoder, **recognizer)
        if feat_in != self.width:
            raise ConfigError(f"The encoder's width is {feat_in}, that of this Whisper decoder {self.width}.")
        self.alternatives, self.residual_scale = alternatives, residual_scale
        self.norm = nn.LayerNorm(self.width)
        self.residual = nn.Linear(self.width, output_dim)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)
        self.register_buffer("embedding_rms", torch.ones(()), persistent=False)
        pieces = self.eos_id + 1 if alternatives else 0
        self.register_buffer("piece_embeddings", torch.zeros(pieces, output_dim), persistent=False)
        self._language_model: tuple[Any, Any] | None = None
        self._text_alone = False  # the residual was zero when the LLM was bound

    @torch.no_grad()
    def bind_language_model(self, tokenizer: Any, embed_tokens: nn.Module) -> None:
        self._tokenizer = None  # the buffer may just have been loaded
        self._language_model = (tokenizer, embed_tokens)  # in a tuple: not a submodule
        self._text_alone = all(not p.is_meta and not bool(p.any()) for p in self.residual.parameters())
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
        """Weights of November 2026 may have a gate, which is left out, and a residual in other units."""
        super().upgrade_state(state, prefix)
        if state.pop(f"{prefix}gate", None) is None:
            return
        for name in ("weight", "bias"):
            key = f"{prefix}residual.{name}"
            state[key] = state[key] * (OLD_RESIDUAL_SCALE / self.residual_scale)

    def labels_of(self, tokens: Iterable[int]) -> list[int]:
        return list(tokens)

    def connect(
        self,
        features: Tensor,
        lengths: Tensor,
        starts: list[bool] | None = None,
        written: list[list[int]] | None = None,
    ) -> SpeechEmbeddings:
        if written is not None and not self._reads_states():
            return self._read(written, None, lengths, starts)
        with evaluation_mode(self):
            encoded, heard = self._encode(features, lengths)
            states = None
            if written is None:
                written, states = self._write(encoded, heard)
            if states is None or torch.is_grad_enabled():
                states = self._forced_states(encoded, heard, written)
        return self._read(written, states, lengths, starts)

    def _reads_states(self) -> bool:
        """Whether the LLM reads more than the text: a residual that is or was trained, the straight-through term."""
        trained = any(p.requires_grad for part in (self.norm, self.residual) for p in part.parameters())
        return self.alternatives > 0 or trained or not self._text_alone

    def _read(
        self, tokens: list[list[int]], states: Tensor | None, lengths: Tensor, starts: list[bool] | None
    ) -> SpeechEmbeddings:
        """What the LLM reads of the text of B rows.

        Args:
            tokens: Whisper's, of each row.
            states: (B, N + 1, D) that predicted them; None: the text alone is read.
            lengths: (B,) frames.
            starts: as in :meth:`connect`.
        """
        assert self._language_model is not None
        tokenizer, embed_tokens = self._language_model
        device = lengths.device
        rows: list[list[tuple[int, int, float]]] = []  # LLM token, place of the Whisper token, center
        for own, frames, start in zip(tokens, lengths.tolist(), starts or [True] * len(tokens), strict=True):
            written = self._language_model_tokens(tokenizer, own, start)
            rows.append([(token, index, (index + 0.5) / max(1, len(own)) * frames) for token, index in written])
        about = [
            [float(not row), word_count(self.tokenizer.decode(own))] for row, own in zip(rows, tokens, strict=True)
        ]
        for row, note in zip(rows, about, strict=True):
            if not row:
                row += [(t, 0, 0.0) for t in tokenizer(NOTHING_HEARD, add_special_tokens=False)["input_ids"]]
            note.append(len(row))
        width = max(map(len, rows))
        flat = [(b * width + p, b, *own) for b, row in enumerate(rows) for p, own in enumerate(row)]
        numbers = [torch.tensor(own, dtype=torch.float64) for own in (flat, about)]
        (*parts, centers), (nothing, words, counts) = (t.unbind(1) for t in all_to_device(numbers, device))
        at, utterance, token, index = (part.long() for part in parts)

        def padded(values: Tensor) -> Tensor:
            whole = values.new_zeros(len(rows) * width, *values.shape[1:])
            return whole.index_copy(0, at, values).unflatten(0, (len(rows), width))

        embedded = embed_tokens(token)
        if states is None:
            embedded = embedded.to(computed_dtype(device, self.residual.weight.dtype))
        else:
            chosen = states[utterance, index]
            extra = self.residual(self.norm(chosen)) * (self.residual_scale * self.embedding_rms)
            if self.alternatives and torch.is_grad_enabled():
                soft = self._likely_embeddings(chosen, index == 0)
                extra = extra + (soft - soft.detach())
            embedded = embedded.to(extra.dtype) + extra
        embeddings = padded(embedded)
        return SpeechEmbeddings(
            embeddings,
            counts.long(),
            padded(centers.float()),
            labels=padded(token),
            nothing_heard=nothing.bool(),
            words=words.long(),
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
        space = "" if first or UNSPACED.match(text) else " "  # a further window of the same utterance
        joint = space + text
        shift = lead - len(space)
        result = []
        for token, (_, end) in zip(*literal_encoding(tokenizer, joint), strict=True):
            byte = len(joint[:end].encode()) + shift
            result.append((token, min(bisect_left(ends, byte), len(tokens) - 1)))
        return result
