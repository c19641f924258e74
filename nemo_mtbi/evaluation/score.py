"""Behavior-imitation scores of a system against the text LLM on the same targets.

- token agreement: share of response tokens that are the system's most likely token under teacher forcing;
- KL per token: KL(text LLM || system) over the full vocabulary at temperature 1, in nats per response token;
- repeat WER: of generated "repeat" answers against the text LLM's own answer, and against the transcript.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jiwer
import torch
from lhotse import CutSet
from torch import Tensor
from tqdm import tqdm

from nemo_mtbi.data.conversation import ConversationIterator, MTBIConversation, TargetSelection, transcript
from nemo_mtbi.data.dataset import Example, MTBIDataset
from nemo_mtbi.data.rendering import Spoken
from nemo_mtbi.losses.imitation import ImitationObjective, imitation_loss
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.modules.language_model import teacher_hidden_states

REPEAT = "repeat"
KL_ONLY = ImitationObjective(w_ce=0.0, w_kl=1.0, temperature=1.0)
EMPTY_TRANSCRIPT = "..."  # what the cascade's LLM reads where the ASR heard nothing


@dataclass
class Scores:
    """Sums of one system on one manifest, by task; and its repeat answers."""

    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    agreed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kl: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    repeats: list[tuple[str, str, str]] = field(default_factory=list)  # answer, text LLM's answer, transcript

    def summary(self) -> dict[str, Any]:
        total = max(1, sum(self.tokens.values()))
        result: dict[str, Any] = {
            "response_tokens": sum(self.tokens.values()),
            "token_agreement": sum(self.agreed.values()) / total,
            "kl_per_token": sum(self.kl.values()) / total,
            "by_task": {
                t: {"token_agreement": self.agreed[t] / n, "kl_per_token": self.kl[t] / n}
                for t, n in self.tokens.items()
            },
        }
        if self.repeats:
            answers, own, spoken = (([normalize(r[i]) for r in self.repeats]) for i in range(3))
            result["repeat_wer"] = word_error_rate(own, answers)
            result["repeat_wer_to_transcript"] = word_error_rate(spoken, answers)
        return result


def normalize(text: str) -> str:
    """Lower case, letters, digits and apostrophes only."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())


def word_error_rate(references: list[str], hypotheses: list[str]) -> float:
    """Corpus WER; pairs whose reference is empty after normalization are left out."""
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r]
    return float(jiwer.wer([r for r, _ in pairs], [h for _, h in pairs])) if pairs else 0.0


class Evaluation:
    """Scores systems on one manifest of cuts with targets.

    Args:
        model: provides tokenizer, LLM and (for speech systems) encoder and connector.
        cuts: with targets.
        cached_features: read encoder features instead of audio.
        batch_size: targets scored together.
    """

    def __init__(self, model: MTBISALM, cuts: CutSet, cached_features: bool, batch_size: int = 32) -> None:
        from omegaconf import OmegaConf

        self.model, self.batch_size = model, batch_size
        options = {
            "audio_locator_tag": model.audio_locator_tag, "speech_position": model.config.speech_position, "force_finite": True
        }  # fmt: skip
        stream = ConversationIterator(cuts, TargetSelection(every_target=True), OmegaConf.create(options))
        self.dataset = MTBIDataset(
            model.tokenizer,
            model.cfg.prompt_format,
            cached_features=cached_features,
            encoder_key=model.encoder_key,
            llm_key=model.references["llm"],
            sampling_rate=model.sampling_rate,
        )
        self.conversations: list[MTBIConversation] = list(stream)
        self.conversations.sort(key=lambda c: len(c.target.response_ids) if c.target else 0)

    @property
    def cuts(self) -> list[Any]:
        """The evaluated cuts, each once, under the ids of their manifest."""
        return list({c.source_id: c.cut.with_id(c.source_id) for c in self.conversations}.values())

    def _batches(self, name: str, conversations: list[MTBIConversation] | None = None) -> Iterator[dict[str, Any]]:
        items = self.conversations if conversations is None else conversations
        for begin in tqdm(range(0, len(items), self.batch_size), desc=name, unit="batch"):
            batch = self.dataset[CutSet(items[begin : begin + self.batch_size])]
            if batch is not None:
                yield self.model.transfer_batch_to_device(batch, self.model.device, 0)

    @torch.no_grad()
    def speech(self, name: str, generate: bool = True) -> Scores:
        """The speech LLM with the connector that the model holds now."""
        scores = Scores()
        for batch in self._batches(name):
            student = self.model.student(batch, interleave=False)
            self._add(scores, batch["examples"], student.hidden, [e.prompt_ids for e in batch["examples"]])
        if generate:
            repeat = [c for c in self.conversations if c.target and c.target.task == REPEAT]
            for batch in self._batches(f"{name}: repeat", repeat):
                self._add_repeats(scores, batch["examples"], self.model.answer(batch, budget(batch["examples"])))
        return scores

    @torch.no_grad()
    def text(self, name: str, transcripts: dict[str, str] | None, generate: bool = True) -> Scores:
        """The text LLM on the reference transcripts (None: topline) or on an ASR's (the cascade), by cut id."""
        scores = Scores()
        for begin in tqdm(range(0, len(self.conversations), self.batch_size), desc=name, unit="batch"):
            items = self.conversations[begin : begin + self.batch_size]
            examples = [self.dataset._example(c) for c in items]
            prompts = [self._prompt(c, transcripts) for c in items]
            hidden = self._hidden(prompts, examples)
            self._add(scores, examples, hidden, [e.prompt_ids for e in examples])
            chosen = [i for i, e in enumerate(examples) if e.task == REPEAT] if generate else []
            if chosen:
                ids = self.model.answer_text([prompts[i] for i in chosen], budget([examples[i] for i in chosen]))
                self._add_repeats(scores, [examples[i] for i in chosen], ids)
        return scores

    def _prompt(self, conversation: MTBIConversation, transcripts: dict[str, str] | None) -> list[int]:
        text = transcript(conversation.cut) if transcripts is None else transcripts[conversation.source_id]
        spoken = Spoken(text.strip() or EMPTY_TRANSCRIPT)
        return self.dataset.renderer.render(conversation.messages(spoken)).ids

    def _hidden(self, prompts: list[list[int]], examples: list[Example]) -> Tensor:
        return teacher_hidden_states(
            self.model.llm, self.model.embed_tokens, prompts, [e.response_ids for e in examples], self.model.prefixes,
            [e.units[0].token_begin for e in examples],
        )  # fmt: skip

    def _add(self, scores: Scores, examples: list[Example], hidden: Tensor, reference_prompts: list[list[int]]) -> None:
        ids = torch.tensor([t for e in examples for t in e.response_ids], device=hidden.device)
        loss = imitation_loss(
            hidden, self.model.head(), ids, KL_ONLY, teacher_hidden=self._hidden(reference_prompts, examples)
        )
        position = 0
        for example in examples:
            part = slice(position, position + len(example.response_ids))
            position = part.stop
            scores.tokens[example.task] += len(example.response_ids)
            scores.agreed[example.task] += float(loss.agreed[part].sum())
            scores.kl[example.task] += float(loss.per_token[part].sum())

    def _add_repeats(self, scores: Scores, examples: list[Example], answers: list[list[int]]) -> None:
        decode = self.model.tokenizer.tokenizer.decode
        for example, answer in zip(examples, answers, strict=True):
            own = decode(example.response_ids, skip_special_tokens=True)
            scores.repeats.append((decode(answer, skip_special_tokens=True), own, example.transcript))


def budget(examples: list[Example]) -> int:
    """Tokens that a repeat answer may take: the longest of the text LLM's, and some."""
    return max(len(e.response_ids) for e in examples) + 8
