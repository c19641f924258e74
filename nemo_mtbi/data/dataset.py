"""The batch contract: conversations to tensors."""

import logging
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from nemo.collections.common.prompts import PromptFormatter

from nemo_mtbi.corpus.failures import raise_if_of_the_machine, sources_of
from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.audio import collate_waveforms, mono_samples
from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.data.chat_template import dialect
from nemo_mtbi.data.conversation import MTBIConversation
from nemo_mtbi.data.example import Example
from nemo_mtbi.data.feature_cache import FEATURES_FIELD, load_array, windows_of, written_of
from nemo_mtbi.data.interleaving import timeline
from nemo_mtbi.data.rendering import PromptRenderer, Spoken
from nemo_mtbi.data.target import IMPOSSIBLE, TEACHER_IDS_FIELD, TEACHER_LOG_PROBS_FIELD, Target, no_log_probabilities
from nemo_mtbi.errors import DataError

log = logging.getLogger(__name__)


class MTBIDataset(torch.utils.data.Dataset):
    """Turns a mini-batch of :class:`MTBIConversation` into a dictionary with these keys (B conversations):

    - ``examples``: list of B :class:`nemo_mtbi.data.example.Example`.
    - ``audios`` (B, S) float32, zero-padded, and ``audio_lens`` (B,) int64 samples; absent with cached features.
    - ``encoder_features`` (N, T, D) bfloat16, zero-padded, and ``encoder_feature_lens`` (N,); only with cached
      features. N is B, unless ``windows`` (:class:`nemo_mtbi.data.audio_windows.Windows`) says whose windows they are.
    - ``written``: what the recognizer writes of each of the N rows; only where it was kept with all of them.
    - ``teacher_ids`` (R, K) int64 and ``teacher_log_probs`` (R, K) float32: the teacher's top-k of all R response
      tokens of the batch, in order; absent unless every example has them.

    A conversation whose audio cannot be read is left out and logged; None if none is left.

    Args:
        tokenizer: NeMo ``AutoTokenizer`` of the LLM.
        prompt_format: name of a NeMo prompt format.
        cached_features: read encoder features instead of audio.
        teacher_temperature: temperature that cached teacher log-probabilities must have; None to ignore them.
        encoder_key: hash of the encoder that cached features must come from.
        writing_key: of the connector, whose kept texts are read with the features; None: of none.
        llm_key: fingerprint of the LLM whose answers the targets must be; empty to take any.
        sampling_rate: of the returned audio; other rates are resampled.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_format: str,
        *,
        cached_features: bool = False,
        teacher_temperature: float | None = None,
        encoder_key: str | None = None,
        writing_key: str | None = None,
        llm_key: str = "",
        sampling_rate: int = 16_000,
    ) -> None:
        self.renderer = PromptRenderer(tokenizer, PromptFormatter.resolve(prompt_format))
        self.dialect = dialect(prompt_format, tokenizer.tokenizer)
        self.cached_features = cached_features
        self.teacher_temperature = teacher_temperature
        self.encoder_key = encoder_key
        self.writing_key = writing_key
        self.told = False  # once, what is missing in the cache
        self.llm_key = llm_key
        self.sampling_rate = sampling_rate

    def __getitem__(self, conversations: CutSet) -> dict[str, Any] | None:
        batch: dict[str, Any] = {}
        items: list[MTBIConversation] = list(conversations)
        if not items:
            return None
        for item in items:
            item.read()
        if self.cached_features:
            batch |= self._features(items)
        else:
            items, waveforms = self._readable(items)
            if not items:
                return None
            batch["audios"], batch["audio_lens"] = collate_waveforms(waveforms)
        batch["examples"] = [self._example(c) for c in items]
        if self.teacher_temperature is not None and all(c.target and c.target.teacher_begin >= 0 for c in items):
            batch |= self._teacher(items)
        return batch

    def _features(self, items: list[MTBIConversation]) -> dict[str, Any]:
        """Encoder features from the cache."""
        places = [windows_of(item.cut) for item in items]
        rows: list[torch.Tensor] = []
        for item, own in zip(items, places, strict=True):
            rows += load_array(item.cut, FEATURES_FIELD, self.encoder_key).tensor_split(own.rows[1:])
        batch: dict[str, Any] = {
            "encoder_features": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "encoder_feature_lens": torch.tensor([len(row) for row in rows]),
            "windows": Windows.of([own.frames for own in places]),
        }
        if self.writing_key is not None:
            written = [written_of(item.cut, self.writing_key) for item in items]
            if None not in written:
                batch["written"] = [tokens for own in written for tokens in own or []]
            elif not self.told:
                self.told = True
                log.info(
                    f"What the recognizer writes of {items[written.index(None)].id} is not in the feature cache, so it "
                    "writes at every visit; cache_features.py adds it."
                )
        return batch

    def _readable(self, items: list[MTBIConversation]) -> tuple[list[MTBIConversation], list[np.ndarray]]:
        """The conversations whose audio can be read, and the audio (S,) of each."""
        kept, waveforms = [], []
        for item in items:
            try:
                waveforms.append(mono_samples(item.cut, self.sampling_rate))
                kept.append(item)
            except Exception as error:  # decoders raise their own types
                try:
                    raise_if_of_the_machine(error, sources_of(item.cut))
                except (OSError, MemoryError) as reason:
                    raise DataError(
                        f"{item.id} cannot be read, and not by its own fault ({type(reason).__name__}: {reason})."
                    ) from error
                log.warning(f"{item.id} is left out: {type(error).__name__}: {str(error)[:200]}")
        return kept, waveforms

    def _example(self, conversation: MTBIConversation) -> Example:
        target = conversation.target
        assert target is not None
        self._require_rendering(conversation.id, target, conversation.speech_position)
        rendered = conversation.rendered or self.renderer.render(conversation.messages())
        duration = conversation.cut.duration
        described = None
        if target.described:
            described = self.renderer.render(conversation.messages(Spoken(target.described))).ids
        return Example(
            conversation.id,
            conversation.visit,
            target.task,
            target.prompt_id,
            rendered.ids,
            timeline(rendered.spoken[-1], duration),
            target.response_ids,
            duration,
            transcript(conversation.cut),
            described,
        )

    def require_fitting(self, name: str, target: Target, speech_position: str) -> None:
        """
        Raises:
            DataError: an answer of another LLM or under another prompt format; with a cached teacher, one without its
                log-probabilities, or with those of another temperature.
        """
        self._require_rendering(name, target, speech_position)
        if self.teacher_temperature is not None:
            if target.teacher_begin < 0:
                raise DataError(no_log_probabilities(name))
            self._require_temperature(name, target)

    def _require_rendering(self, name: str, target: Target, speech_position: str) -> None:
        own = Target.rendering_of(self.dialect, speech_position, self.llm_key)
        if self.llm_key and target.rendering and target.rendering != own:
            raise DataError(
                f"The answer of {name} was given under {target.rendering} (prompt format / speech position / LLM), "
                f"this model has {own}. Use the same in both, or generate the targets again."
            )

    def _require_temperature(self, name: str, target: Target) -> None:
        if target.teacher_temperature != self.teacher_temperature:
            raise DataError(
                f"The teacher log-probabilities of {name} were stored at temperature {target.teacher_temperature}, "
                f"the objective uses {self.teacher_temperature}. Generate the targets again, or set "
                "model.imitation.temperature to theirs."
            )

    def _teacher(self, items: list[MTBIConversation]) -> dict[str, torch.Tensor]:
        ids, log_probs = [], []
        for item in items:
            target = item.target
            assert target is not None
            self._require_temperature(item.id, target)
            rows = slice(target.teacher_begin, target.teacher_begin + len(target.response_ids))
            ids.append(np.asarray(item.cut.load_custom(TEACHER_IDS_FIELD)[rows], dtype=np.int64))
            log_probs.append(np.asarray(item.cut.load_custom(TEACHER_LOG_PROBS_FIELD)[rows], dtype=np.float32))
            # Greedy answers: each response token is among its row's entries. Rows of another answer would not hold it.
            fits = len(ids[-1]) == len(target.response_ids)
            if not fits or not (ids[-1] == np.asarray(target.response_ids)[:, None]).any(1).all():
                raise DataError(
                    f"The teacher log-probabilities of {item.id} ({len(ids[-1])} rows) belong to another answer "
                    f"than its "
                    f"{len(target.response_ids)} response tokens. The target files are inconsistent: generate "
                    f"them again."
                )
        most = max(own.shape[1] for own in ids)  # manifests may have been answered with different top_k
        whole = [filled(*own, most) for own in zip(ids, log_probs, strict=True)]
        return {
            "teacher_ids": torch.from_numpy(np.concatenate([own for own, _ in whole])),
            "teacher_log_probs": torch.from_numpy(np.concatenate([own for _, own in whole])),
        }


def filled(ids: np.ndarray, log_probs: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A teacher's rows (R, K) with ``size`` entries: the further ones are tokens that a row does not have yet, and
    impossible."""
    if (lacking := size - ids.shape[1]) <= 0:
        return ids, log_probs
    there = (ids[:, None] == np.arange(size)[:, None]).any(-1)  # of `size` tokens a row of fewer has not all
    others = np.argsort(there, axis=1, kind="stable")[:, :lacking]
    impossible = np.full(others.shape, IMPOSSIBLE, log_probs.dtype)
    return np.concatenate([ids, others], 1), np.concatenate([log_probs, impossible], 1)
