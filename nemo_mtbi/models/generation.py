"""Answers from text and speech: SALM's ``generate`` signature, and ``chat`` for one question about one audio.

Letters: N audios, S samples, B dialogs, L positions, H LLM width.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from nemo_mtbi.data.audio import waveform
from nemo_mtbi.data.audio_stream import AudioBlocks, open_audio
from nemo_mtbi.data.example import Piece, plan_batch
from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.data.messages import user_message
from nemo_mtbi.data.rendering import AudioTag, Message, PromptRenderer
from nemo_mtbi.data.time_marks import require_time_marks, with_time_marks
from nemo_mtbi.errors import DataError
from nemo_mtbi.models.conversation import Audio, Conversation
from nemo_mtbi.models.hearing import Heard, hear
from nemo_mtbi.models.layout import build_inputs
from nemo_mtbi.models.speech import batch_features, connect, fused
from nemo_mtbi.modules.causal_lm import end_of_turn, lent_embedding, stop_ids, without_adapters
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings
from nemo_mtbi.modules.perception import connector_of, context_of, fusion_of

Audios = Tensor | Sequence[AudioBlocks] | Heard


class SpeechLLM(nn.Module):
    """What answers; :class:`nemo_mtbi.models.MTBISALM` and :class:`nemo_mtbi.models.exported.ExportedSpeechLLM` bring
    the parts.
    """

    llm: Any
    embed_tokens: Any
    perception: Any
    tokenizer: Any
    config: Any
    frame_seconds: float
    audio_locator_tag: str
    marks_seconds: float | None = None

    @property
    def sampling_rate(self) -> int:
        return int(self.perception.preprocessor.featurizer.sample_rate)

    def prompt_formatter(self) -> type:
        """The prompt format: what :class:`nemo_mtbi.data.rendering.PromptRenderer` renders with."""
        raise NotImplementedError

    def limit_positions(self, max_positions: int | None, per_second: float | None = None) -> None:
        """Give the LLM at most that many positions of each audio, and of each second of it (see
        :class:`nemo_mtbi.modules.fusion.Fusion`).

        Raises:
            ConfigError: an impossible number, or a connector whose positions cannot be merged.
        """
        options = {"max_positions": max_positions, "per_second": per_second}
        self.perception.fusion = fusion_of(self.config.perception, options, context_of(self.llm.config))

    def mark_times(self, every_seconds: float | None) -> None:
        """Put the time as text before every so many seconds of speech (``[00:30]``), so that answers can refer to it.

        Raises:
            ConfigError: not a number of at least 1.
        """
        require_time_marks(every_seconds)
        self.marks_seconds = every_seconds

    def listen_as(self, max_positions: int | None, per_second: float | None, time_marks: float | None) -> None:
        """:meth:`limit_positions`, of which those that are None are the model's own, and :meth:`mark_times`."""
        own = self.config.perception.get("fusion") or {}
        if max_positions is not None or per_second is not None:
            self.limit_positions(
                own.get("max_positions") if max_positions is None else max_positions,
                own.get("per_second") if per_second is None else per_second,
            )
        self.mark_times(time_marks)

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the LLM's own."""
        return stop_ids(self.tokenizer.tokenizer, self.llm.generation_config)

    def _padding_id(self) -> int:
        own = self.tokenizer.tokenizer.pad_token_id
        return self.stop_ids()[0] if own is None else own

    def end_of_turn(self) -> int:
        """The token that ends an answer in training."""
        return end_of_turn(self.tokenizer.tokenizer, self.llm.generation_config)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[dict[str, Any]]],
        audios: Audios | None = None,
        audio_lens: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Answer dialogs; SALM's interface.

        Args:
            prompts: dialogs; a message is {"role", "content"}, and optionally "audio": path or list of paths. The
                content is a string with ``<|audio|>`` where an audio stands, or a list of texts, which are read letter
                by letter, and :class:`nemo_mtbi.data.rendering.AudioTag`.
            audios, audio_lens: (N, S) waveforms at ``sampling_rate`` and (N,) samples, in the order of the tags;
                instead of paths. Or ``audios`` alone: N audios in blocks of samples
                (:mod:`nemo_mtbi.data.audio_stream`), or what :meth:`listen` gave for them.
            generation_config, generation_kwargs: passed to Transformers' ``generate``.

        Returns:
            (B, new tokens) token ids, padded on the right.

        Raises:
            DataError: as many audios as ``<|audio|>`` tags are needed; an audio cannot be read; the LLM's context is
                too small.
        """
        if audios is None:
            paths = [p for dialog in prompts for m in dialog for p in _as_list(m.get("audio"))]
            if paths:
                audios = [open_audio(p, self.sampling_rate) for p in paths]
        pieces, tags = self.prompt_pieces(prompts)
        given = 0 if audios is None else len(audios.seconds if isinstance(audios, Heard) else audios)
        if tags != given:
            raise DataError(
                f"The dialogs hold {tags} {self.audio_locator_tag} tags, but {given} audios "
                "came with them. Write one tag for each audio."
            )
        training = self.training
        self.eval()
        try:
            inputs, mask, silent = self.dialog_inputs(prompts, pieces, audios, audio_lens)
            self.require_context(int(mask.sum(1).max()))
            return self._answers(inputs, mask, silent, generation_config, **generation_kwargs)
        finally:
            self.train(training)

    def dialog_inputs(
        self,
        prompts: list[list[dict[str, Any]]],
        pieces: list[list[Piece]],
        audios: Audios | None,
        audio_lens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[bool]]:
        """Embeddings (B, L, H) of dialogs and their :meth:`prompt_pieces`, left-padded; their mask (B, L); and whether
        the audio of each one's last message holds no speech, so that :meth:`nothing_heard_ids` is its answer.

        ``audios``, ``audio_lens``: as :meth:`generate` takes them.
        """
        heard = self.listen(audios, audio_lens)
        last = [self._parts(dialog[-1]["content"]) for dialog in prompts]
        asked = [_audios_of_message(row, content) for row, content in zip(pieces, last, strict=True)]
        if self.marks_seconds is not None:
            tokenizer = self.tokenizer.tokenizer
            pieces = with_time_marks(
                pieces, heard.seconds, self.marks_seconds, lambda text: literal_encoding(tokenizer, text)[0]
            )
        inputs, mask = self._left_padded_inputs(pieces, heard.speech, heard.seconds)
        return inputs, mask, self._nothing_heard(heard.speech, asked)

    def nothing_heard_ids(self) -> list[int]:
        """The answer to audio without speech (``model.nothing_heard_answer``), end of turn included."""
        ids, _ = literal_encoding(self.tokenizer.tokenizer, self.config.nothing_heard_answer)
        return [*ids, self.end_of_turn()]

    def _nothing_heard(self, speech: SpeechEmbeddings, asked: list[list[int]]) -> list[bool]:
        """Whether all of each question's audios (rows of ``speech``) hold no speech, and that has its own answer."""
        if speech.nothing_heard is None or self.config.nothing_heard_answer is None:
            return [False] * len(asked)
        silent = speech.nothing_heard.tolist()
        return [bool(rows) and all(silent[row] for row in rows) for rows in asked]

    def _answers(
        self, inputs: Tensor, mask: Tensor, silent: list[bool], config: GenerationConfig | None = None, **options: Any
    ) -> Tensor:
        """:meth:`generate_from_embeddings`, where ``silent`` rows get ``model.nothing_heard_answer``.

        Raises:
            DataError: something else than token ids is asked for.
        """
        if options.get("return_dict_in_generate") or getattr(config, "return_dict_in_generate", None):
            raise DataError("return_dict_in_generate: generate gives token ids; ask model.generate_from_embeddings.")
        if not any(silent):
            return self.generate_from_embeddings(inputs, mask, config, **options)
        answer = torch.tensor(self.nothing_heard_ids(), device=inputs.device)
        heard = [row for row, nothing in enumerate(silent) if not nothing]
        several = options.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1
        rows = [answer] * (len(silent) * several)
        if heard:
            given = self.generate_from_embeddings(inputs[heard], mask[heard], config, **options)
            for place, own in enumerate(given):
                rows[heard[place // several] * several + place % several] = own
        elif "streamer" in options:
            options["streamer"].put(answer.cpu())
            options["streamer"].end()
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._padding_id())

    def generate_from_embeddings(
        self, inputs: Tensor, mask: Tensor, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Tensor:
        """inputs (B, L, H), mask (B, L), left-padded -> new token ids (B, N)."""
        generation_config = self._generation_config(generation_config)
        with lent_embedding(self):
            return self.llm.generate(
                inputs_embeds=inputs, attention_mask=mask, generation_config=generation_config, **kwargs
            )

    def _generation_config(self, given: GenerationConfig | None) -> GenerationConfig:
        """``given``; what it leaves open is as the targets were decoded, whatever the LLM's own file says."""
        config = GenerationConfig() if given is None else copy.deepcopy(given)
        ours = {
            "bos_token_id": self.tokenizer.tokenizer.bos_token_id,
            "eos_token_id": self.stop_ids(),
            "pad_token_id": self._padding_id(),
            "do_sample": False,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
        }
        for name, value in ours.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        return config

    def generation_inputs(
        self, pieces: list[list[Piece]], audios: Tensor | None, audio_lens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, H), left-padded, and their mask (B, L)."""
        heard = self.listen(audios, audio_lens)
        return self._left_padded_inputs(pieces, heard.speech, heard.seconds)

    def require_context(self, positions: int) -> None:
        """
        Raises:
            DataError: the LLM reads fewer positions.
        """
        context = context_of(self.llm.config)
        if context is not None and positions >= context:
            raise DataError(
                f"The messages take {positions} positions of the LLM, whose context has {context}. Give less text or "
                "shorter audio, or a budget for its positions (max_positions)."
            )

    def listen(
        self,
        audios: Audios | None,
        audio_lens: Tensor | None = None,
        on_heard: Callable[[float], None] = lambda seconds: None,
    ) -> Heard:
        """Audios as the LLM reads them, for any number of questions.

        Args:
            audios, audio_lens: as :meth:`generate` takes them.
            on_heard: told how many seconds are done, see :func:`nemo_mtbi.models.hearing.hear`.

        Raises:
            DataError: an audio cannot be read.
        """
        if isinstance(audios, Heard):
            return audios
        device = self.embed_tokens.weight.device
        if isinstance(audios, Tensor):
            assert audio_lens is not None
            audios = [[waveform(row[:length])] for row, length in zip(audios, audio_lens.tolist(), strict=True)]
        if audios:
            training = self.training
            self.eval()
            try:
                return hear(self.perception, audios, device, on_heard, self.marks_seconds)
            finally:
                self.train(training)
        empty = torch.zeros(0, 0, self.llm.config.hidden_size, device=device)
        return Heard(SpeechEmbeddings(empty, torch.zeros(0, dtype=torch.long, device=device), empty[..., 0]), [])

    def _left_padded_inputs(
        self, pieces: list[list[Piece]], speech: SpeechEmbeddings, seconds: list[float]
    ) -> tuple[Tensor, Tensor]:
        none: list[list[int]] = [[] for _ in pieces]
        inputs, layout = build_inputs(pieces, none, speech, seconds, self.frame_seconds, self.embed_tokens)
        return left_pad(inputs, layout.lengths)

    @torch.no_grad()
    def answer(self, batch: dict[str, Any], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers (token ids, end-of-turn cut off) to the examples of a batch of :class:`MTBIDataset`, from
        speech.
        """
        examples = batch["examples"]
        pieces = plan_batch(examples, None, 0, self.opening)
        seconds = [e.duration_seconds for e in examples]
        speech = fused(self.perception, connect(self.perception, *batch_features(self.perception, batch)), seconds)
        silent = self._nothing_heard(speech, [[row] for row in range(len(examples))])
        return self._greedy(*self._left_padded_inputs(pieces, speech, seconds), max_new_tokens, silent)

    @torch.no_grad()
    def answer_text(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers of the text LLM to rendered prompts (token ids)."""
        with without_adapters(self.llm):
            return self._greedy(*self.generation_inputs([[p] for p in prompts], None, None), max_new_tokens)

    def _greedy(
        self, inputs: Tensor, mask: Tensor, max_new_tokens: int, silent: list[bool] | None = None
    ) -> list[list[int]]:
        stop = set(self.stop_ids())
        silent = silent or [False] * len(inputs)
        rows = self._answers(inputs, mask, silent, max_new_tokens=max_new_tokens, do_sample=False).tolist()
        return [row[: next((i for i, t in enumerate(row) if t in stop), len(row))] for row in rows]

    @property
    def opening(self) -> list[int]:
        """Tokens that stand before every utterance; see :attr:`Connector.opening`."""
        connector = connector_of(self.perception)
        return [] if connector is None else connector.opening

    def prompt_pieces(self, prompts: list[list[dict[str, Any]]]) -> tuple[list[list[Piece]], int]:
        """Dialogs as pieces, a span for each audio tag, numbered in order. -> pieces, audio tags."""
        renderer = PromptRenderer(self.tokenizer, self.prompt_formatter())
        pieces, audio, opening = [], 0, self.opening
        for dialog in prompts:
            rendered = renderer.render([{"role": m["role"], "content": self._parts(m["content"])} for m in dialog])
            row: list[Piece] = []
            begin = 0
            for place in rendered.tags:
                row += [[*rendered.ids[begin:place], *opening], SpeechSpan(audio, 0.0, float("inf"))]
                begin, audio = place + 1, audio + 1
            pieces.append([*row, rendered.ids[begin:]])
        return pieces, audio

    def _parts(self, content: str | list[Any]) -> list[Any]:
        """The parts of a message: a list as it is, where strings are text letter by letter; of a string, as SALM has
        it, every ``<|audio|>`` stands for an audio."""
        if not isinstance(content, str):
            return list(content)
        texts = content.split(self.audio_locator_tag)
        tag = AudioTag(self.audio_locator_tag)
        return [part for text in texts for part in (tag, text)][1:]

    def user_turn(self, prompt: str, audios: int = 1) -> Message:
        """The user's message about that many audios, laid out as in training; the prompt is read letter by letter."""
        if not audios:
            return {"role": "user", "content": [prompt.strip()]}
        tag = AudioTag(self.audio_locator_tag)
        message = user_message(prompt, tag, self.config.speech_position)
        place = message["content"].index(tag)
        message["content"][place : place + 1] = [part for _ in range(audios) for part in (tag, "\n")][:-1]
        return message

    def text_turn(self, prompt: str, transcript: str) -> Message:
        """:meth:`user_turn` with a transcript in the place of the audio: what the text LLM and a cascade read."""
        return user_message(prompt, transcript.strip(), self.config.speech_position)

    def chat(self, audio: Audio | Sequence[Audio], prompt: str, **generation: Any) -> str:
        """The answer to one question about audio; see :meth:`Conversation.ask`."""
        return Conversation(self).ask(prompt, audio, **generation)

    def stream(self, audio: Audio | Sequence[Audio], prompt: str, **generation: Any) -> Iterator[str]:
        """:meth:`chat`, in pieces as they are generated."""
        return Conversation(self).stream(prompt, audio, **generation)


def left_pad(inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Move right padding to the left. inputs (B, L, H), lengths (B,) -> (B, L, H), mask (B, L)."""
    width = inputs.shape[1]
    shift = (width - lengths)[:, None]
    position = torch.arange(width, device=inputs.device)
    mask = position >= shift
    index = (position - shift).clamp_min(0)
    return inputs.gather(1, index[..., None].expand_as(inputs)) * mask[..., None], mask.long()


def _audios_of_message(pieces: list[Piece], content: list[Any]) -> list[int]:
    """Rows of the audios in the last message of a dialog."""
    count = sum(isinstance(part, AudioTag) for part in content)
    rows = [p.audio for p in pieces if isinstance(p, SpeechSpan)]
    return rows[len(rows) - count :]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
