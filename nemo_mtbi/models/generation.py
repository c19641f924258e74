"""Answers from text and speech: SALM's ``generate`` signature, and ``chat`` for one question about one audio."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lhotse import Recording
from lhotse.audio import AudioLoadingError
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.speechlm2.parts.pretrained import move_embedding
from torch import Tensor
from transformers import GenerationConfig

from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.data.messages import user_message
from nemo_mtbi.errors import DataError
from nemo_mtbi.models.assembly import Piece, plan_batch
from nemo_mtbi.modules.connectors import SpeechEmbeddings
from nemo_mtbi.modules.language_model import without_adapters

if TYPE_CHECKING:
    from nemo_mtbi.models.dialog import Audio

MIN_AUDIO_SECONDS = 0.05


def load_waveform(path: str | Path, sampling_rate: int) -> np.ndarray:
    """A file as float32 mono at ``sampling_rate``; any rate, channel count and format that Lhotse reads.

    Raises:
        DataError: the file is missing, unreadable or shorter than 50 ms.
    """
    if not Path(path).is_file():
        raise DataError(f"There is no audio file {path}.")
    try:
        recording = Recording.from_file(path)
        samples = recording.resample(sampling_rate).load_audio().mean(0)
    except (AudioLoadingError, RuntimeError, ValueError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as audio ({str(error).splitlines()[0]}). Is it a complete audio file?"
        ) from error
    except Exception as error:  # decoders raise their own types
        raise DataError(f"{path} cannot be read as audio ({type(error).__name__}: {error}).") from error
    if len(samples) < MIN_AUDIO_SECONDS * sampling_rate:
        raise DataError(
            f"{path} lasts {len(samples) / sampling_rate:.3f} s; at least {MIN_AUDIO_SECONDS} s are needed."
        )
    return np.ascontiguousarray(samples, dtype=np.float32)


def collate_waveforms(waveforms: Sequence[np.ndarray | Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms (S_i,) -> (B, S) zero-padded on the right, lengths (B,)."""
    tensors = [torch.as_tensor(w, dtype=torch.float32) for w in waveforms]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), torch.tensor([len(t) for t in tensors])


class GenerationMixin:
    """Mixin for :class:`nemo_mtbi.models.MTBISALM`."""

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the LLM's own."""
        own = self.llm.generation_config.eos_token_id  # type: ignore[attr-defined]
        ids = {self.tokenizer.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}  # type: ignore[attr-defined]
        return sorted(i for i in ids if i is not None)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[dict[str, Any]]],
        audios: Tensor | None = None,
        audio_lens: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Answer dialogs; SALM's interface.

        Args:
            prompts: dialogs; a message is {"role", "content"} with ``<|audio|>`` where an audio stands, and optionally
                "audio": path or list of paths.
            audios, audio_lens: (N, S) waveforms at ``sampling_rate`` and (N,) samples, in the order of the tags;
                instead of paths.
            generation_config, generation_kwargs: passed to Transformers' ``generate``.

        Returns:
            (B, new tokens) token ids, padded on the right.

        Raises:
            DataError: as many audios as ``<|audio|>`` tags are needed; an audio cannot be read.
        """
        if audios is None:
            paths = [p for dialog in prompts for m in dialog for p in _as_list(m.get("audio"))]
            if paths:
                audios, audio_lens = collate_waveforms([load_waveform(p, self.sampling_rate) for p in paths])  # type: ignore[attr-defined]
        pieces, tags = self._prompt_pieces(prompts)
        if tags != (0 if audios is None else len(audios)):
            raise DataError(
                f"The dialogs hold {tags} {self.audio_locator_tag} tags, but {0 if audios is None else len(audios)} audios "  # type: ignore[attr-defined]
                "came with them. Write one tag for each audio."
            )
        training = self.training  # type: ignore[attr-defined]
        self.eval()  # type: ignore[attr-defined]
        try:
            inputs, mask = self.generation_inputs(pieces, audios, audio_lens)
            return self.generate_from_embeddings(inputs, mask, generation_config, **generation_kwargs)
        finally:
            self.train(training)  # type: ignore[attr-defined]

    def generate_from_embeddings(
        self, inputs: Tensor, mask: Tensor, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Tensor:
        """inputs (B, L, H), mask (B, L), left-padded -> new token ids (B, N)."""
        tokenizer = self.tokenizer.tokenizer  # type: ignore[attr-defined]
        stop = self.stop_ids()
        generation_config = generation_config or GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=stop,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0],
        )  # fmt: skip
        with move_embedding(self):
            return self.llm.generate(  # type: ignore[attr-defined]
                inputs_embeds=inputs, attention_mask=mask, generation_config=generation_config, **kwargs
            )

    def generation_inputs(
        self, pieces: list[list[Piece]], audios: Tensor | None, audio_lens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, H), left-padded, and their mask (B, L)."""
        device = self.device  # type: ignore[attr-defined]
        if audios is not None and audio_lens is not None:
            features, lengths = self.encode(audios.to(device), audio_lens.to(device))  # type: ignore[attr-defined]
            speech = self.connect(features, lengths)  # type: ignore[attr-defined]
            seconds = (audio_lens / self.sampling_rate).tolist()  # type: ignore[attr-defined]
        else:
            width = self.llm.config.hidden_size  # type: ignore[attr-defined]
            empty = torch.zeros(0, 0, width, device=device)
            speech, seconds = (
                SpeechEmbeddings(empty, torch.zeros(0, dtype=torch.long, device=device), empty[..., 0]),
                [],
            )
        inputs, layout = self.lay_out(pieces, [[] for _ in pieces], speech, seconds)  # type: ignore[attr-defined]
        return left_pad(inputs, layout.lengths)

    @torch.no_grad()
    def answer(self, batch: dict[str, Any], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers (token ids, end-of-turn cut off) to the examples of a batch of :class:`MTBIDataset`, from speech."""
        examples = batch["examples"]
        speech = self.connect(*self.batch_features(batch))  # type: ignore[attr-defined]
        pieces, seconds = plan_batch(examples, None, 0), [e.duration_seconds for e in examples]
        inputs, layout = self.lay_out(pieces, [[] for _ in pieces], speech, seconds)  # type: ignore[attr-defined]
        return self._greedy(*left_pad(inputs, layout.lengths), max_new_tokens)

    @torch.no_grad()
    def answer_text(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers of the text LLM to rendered prompts (token ids)."""
        with without_adapters(self.llm):  # type: ignore[attr-defined]
            return self._greedy(*self.generation_inputs([[p] for p in prompts], None, None), max_new_tokens)

    def _greedy(self, inputs: Tensor, mask: Tensor, max_new_tokens: int) -> list[list[int]]:
        stop = set(self.stop_ids())
        rows = self.generate_from_embeddings(inputs, mask, max_new_tokens=max_new_tokens, do_sample=False).tolist()
        return [row[: next((i for i, t in enumerate(row) if t in stop), len(row))] for row in rows]

    def _prompt_pieces(self, prompts: list[list[dict[str, Any]]]) -> tuple[list[list[Piece]], int]:
        formatter = PromptFormatter.resolve(self.cfg.prompt_format)(self.tokenizer)  # type: ignore[attr-defined]
        tag = self.audio_locator_tag_id  # type: ignore[attr-defined]
        pieces, audio = [], 0
        for dialog in prompts:
            turns = [{k: v for k, v in m.items() if k != "audio"} for m in dialog]
            row: list[Piece] = [[]]
            for token in formatter.encode_dialog(turns)["context_ids"].tolist():
                if token == tag:
                    row += [SpeechSpan(audio, 0.0, float("inf")), []]
                    audio += 1
                else:
                    row[-1].append(token)  # type: ignore[union-attr]
            pieces.append(row)
        return pieces, audio

    def user_turn(self, prompt: str, audios: int = 1) -> dict[str, str]:
        """The user's message about that many audios, laid out as in training."""
        if not audios:
            return {"role": "user", "content": prompt.strip()}
        tags = "\n".join([self.audio_locator_tag] * audios)  # type: ignore[attr-defined]
        message = user_message(prompt, tags, self.config.speech_position)  # type: ignore[attr-defined]
        return {"role": "user", "content": "".join(message["content"])}

    def chat(self, audio: "Audio | Sequence[Audio]", prompt: str, **generation: Any) -> str:
        """The answer to one question about audio; see :meth:`nemo_mtbi.models.dialog.Conversation.ask`."""
        from nemo_mtbi.models.dialog import Conversation

        return Conversation(self).ask(prompt, audio, **generation)  # type: ignore[arg-type]

    def stream(self, audio: "Audio | Sequence[Audio]", prompt: str, **generation: Any) -> Iterator[str]:
        """:meth:`chat`, in pieces as they are generated."""
        from nemo_mtbi.models.dialog import Conversation

        return Conversation(self).stream(prompt, audio, **generation)  # type: ignore[arg-type]


def left_pad(inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Move right padding to the left. inputs (B, L, H), lengths (B,) -> (B, L, H), mask (B, L)."""
    width = inputs.shape[1]
    shift = (width - lengths)[:, None]
    position = torch.arange(width, device=inputs.device)
    mask = position >= shift
    index = (position - shift).clamp_min(0)
    return inputs.gather(1, index[..., None].expand_as(inputs)) * mask[..., None], mask.long()


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
