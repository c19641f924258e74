"""Systems that answer prompts about speech, behind one interface: the speech LLM, the text topline and the cascade.

A :class:`SystemBatch` is what a system makes of a batch of conversations once; answers and teacher-forced scores are
taken from it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from lhotse import CutSet
from omegaconf import OmegaConf
from torch import Tensor

from nemo_mtbi import console
from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.audio import collate_waveforms, mono_samples
from nemo_mtbi.data.conversation import ConversationIterator, MTBIConversation, TargetSelection
from nemo_mtbi.data.cut_lines import Share
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.example import Example
from nemo_mtbi.data.messages import NOTHING_HEARD, user_message
from nemo_mtbi.data.rendering import Spoken
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.text import normalized
from nemo_mtbi.losses.imitation import imitation_loss
from nemo_mtbi.losses.objective import CROSS_ENTROPY, ImitationObjective
from nemo_mtbi.models.language_model import teacher_hidden_states
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.models.setup import trained_in_llm
from nemo_mtbi.models.speech import batch_features, transcribe
from nemo_mtbi.modules.perception import writing_key

log = logging.getLogger(__name__)

KL_ONLY = ImitationObjective(w_ce=0.0, w_kl=1.0, temperature=1.0)


class EvaluationSet:
    """The conversations of one manifest of cuts with targets, as a model reads them.

    Args:
        model: gives tokenizer, prompt format and the encoder that cached features must come from.
        cuts: with targets.
        cached_features: read encoder features instead of audio.
        every_cut: one conversation for each cut, with targets or without, for what needs no answers.
    """

    def __init__(self, model: MTBISALM, cuts: CutSet, cached_features: bool, every_cut: bool = False) -> None:
        options = {
            "audio_locator_tag": model.audio_locator_tag,
            "speech_position": model.config.speech_position,
            "force_finite": True,
            "every_cut": every_cut,
        }
        self.dataset = MTBIDataset(
            model.tokenizer,
            model.cfg.prompt_format,
            cached_features=cached_features,
            encoder_key=model.encoder_key,
            writing_key=writing_key(model.perception) if cached_features else None,
            llm_key=model.references["llm"],
            sampling_rate=model.sampling_rate,
        )
        stream = ConversationIterator(Share(cuts), TargetSelection(every_target=True), OmegaConf.create(options))
        self.conversations: list[MTBIConversation] = list(stream)
        self.conversations.sort(key=lambda c: len(c.target.response_ids) if c.target else 0)

    @property
    def cuts(self) -> list[Any]:
        """The cuts, each once, under the ids of their manifest."""
        return list({c.source_id: c.cut.with_id(c.source_id) for c in self.conversations}.values())


@dataclass
class SystemBatch:
    """A batch as a system reads it. ``examples[i]`` belongs to ``conversations[i]``; conversations whose audio cannot
    be read are left out. ``inputs`` is the system's own."""

    conversations: list[MTBIConversation]
    examples: list[Example]
    inputs: Any


class System(Protocol):
    """What the evaluation asks of a system.

    ``teacher_forced``: whether it has ``hidden``, states for the head of the text LLM; without them answers alone are
        scored.
    """

    teacher_forced: bool

    def read(self, questions: EvaluationSet, conversations: list[MTBIConversation]) -> SystemBatch | None: ...

    def hidden(self, reading: SystemBatch, responses: list[list[int]]) -> Tensor:
        """(R, H): states that predict the tokens of one response for each example, under teacher forcing."""

    def answers(self, reading: SystemBatch, budgets: list[int]) -> list[str]:
        """Greedy answers, each of at most so many tokens, whatever it is batched with."""


class SpeechSystem:
    """The speech LLM with the connector that the model holds now."""

    teacher_forced = True

    def __init__(self, model: MTBISALM) -> None:
        self.model = model

    def read(self, questions: EvaluationSet, conversations: list[MTBIConversation]) -> SystemBatch | None:
        batch = questions.dataset[CutSet(conversations)]
        if batch is None:
            return None
        batch = self.model.transfer_batch_to_device(batch, self.model.device, 0)
        batch_features(self.model.perception, batch)  # once, for all that is asked of the reading
        own = {c.id: c for c in conversations}
        return SystemBatch([own[e.id] for e in batch["examples"]], batch["examples"], batch)

    def hidden(self, reading: SystemBatch, responses: list[list[int]]) -> Tensor:
        examples = [replace(e, response_ids=r) for e, r in zip(reading.examples, responses, strict=True)]
        return self.model.student({**reading.inputs, "examples": examples}, interleave=False).hidden

    def answers(self, reading: SystemBatch, budgets: list[int]) -> list[str]:
        return decoded(self.model.tokenizer.tokenizer, self.model.answer(reading.inputs, max(budgets)), budgets)

    def transcripts(self, reading: SystemBatch) -> list[str] | None:
        """What the connector itself writes; None for connectors without text."""
        perception = self.model.perception
        return transcribe(perception, *batch_features(perception, reading.inputs))


class TextSystem:
    """The text LLM on the reference transcripts (None: the topline, which reads the descriptions that it answered
    from), or on an ASR's (the cascade), by cut id.

    Conversations that the ASR has no transcript of (unreadable audio) are left out.
    """

    teacher_forced = True

    def __init__(self, model: MTBISALM, transcripts: dict[str, str] | None) -> None:
        self.model, self.transcripts = model, transcripts

    def normalized(self) -> "TextSystem":
        """The same with transcripts in lower case without punctuation, as many corpora's are."""
        own = self.transcripts
        return TextSystem(self.model, None if own is None else {i: normalized(t) for i, t in own.items()})

    def read(self, questions: EvaluationSet, conversations: list[MTBIConversation]) -> SystemBatch | None:
        if self.transcripts is not None:
            conversations = [c for c in conversations if c.source_id in self.transcripts]
        if not conversations:
            return None
        prompts = [questions.dataset.renderer.render(c.messages(self._spoken(c))).ids for c in conversations]
        return SystemBatch(conversations, [questions.dataset._example(c) for c in conversations], prompts)

    def _spoken(self, conversation: MTBIConversation) -> Spoken:
        own, target = self.transcripts, conversation.target
        if own is None and target is not None and target.described:
            return Spoken(target.described)
        text = transcript(conversation.cut) if own is None else own[conversation.source_id]
        return Spoken(text.strip() or NOTHING_HEARD)

    def hidden(self, reading: SystemBatch, responses: list[list[int]]) -> Tensor:
        return text_hidden(self.model, reading.inputs, responses, reading.examples)

    def answers(self, reading: SystemBatch, budgets: list[int]) -> list[str]:
        return decoded(self.model.tokenizer.tokenizer, self.model.answer_text(reading.inputs, max(budgets)), budgets)


class SALMSystem:
    """Any speech LLM of NeMo's class ``SALM``, with an LLM of its own: its answers are scored, its probabilities are
    not.

    Args:
        name: directory or hub name that ``SALM.from_pretrained`` opens.
        device: where it computes.
    """

    teacher_forced = False

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        from nemo.collections.speechlm2.models.salm import SALM

        self.model = SALM.from_pretrained(name).to(device).eval()

    def read(self, questions: EvaluationSet, conversations: list[MTBIConversation]) -> SystemBatch | None:
        waveforms, kept = [], []
        for conversation in conversations:
            try:
                waveforms.append(mono_samples(conversation.cut, self.model.sampling_rate))
                kept.append(conversation)
            except Exception as error:  # decoders raise their own types
                log.warning(f"{conversation.source_id} is left out: its audio cannot be read ({error}).")
        if not kept:
            return None
        return SystemBatch(kept, [questions.dataset._example(c) for c in kept], collate_waveforms(waveforms))

    def hidden(self, reading: SystemBatch, responses: list[list[int]]) -> Tensor:
        raise NotImplementedError("NeMo's SALM gives no states for another model's head.")

    def answers(self, reading: SystemBatch, budgets: list[int]) -> list[str]:
        audios, lengths = (t.to(self.model.device) for t in reading.inputs)
        tag = self.model.audio_locator_tag
        prompts = [
            [{"role": "user", "content": "".join(user_message(c.target.prompt, tag, "after")["content"])}]
            for c in reading.conversations
            if c.target is not None
        ]
        rows = self.model.generate(
            prompts=prompts, audios=audios, audio_lens=lengths, max_new_tokens=max(budgets), do_sample=False
        )
        return decoded(self.model.tokenizer.tokenizer, [list(map(int, row)) for row in rows], budgets)


def decoded(tokenizer: Any, rows: list[list[int]], budgets: list[int]) -> list[str]:
    """Answers as text, each cut at its own budget."""
    cut = [row[:budget] for row, budget in zip(rows, budgets, strict=True)]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]


def text_hidden(
    model: MTBISALM, prompts: list[list[int]], responses: list[list[int]], examples: list[Example]
) -> Tensor:
    """The text LLM's states (R, H) that predict the tokens of ``responses`` after rendered prompts."""
    beginnings = [e.units[0].token_begin for e in examples]
    return teacher_hidden_states(
        model.llm, model.embed_tokens, prompts, responses, model.prefixes, beginnings, packed=model.packs
    )


@dataclass(frozen=True)
class TeacherForcedSums:
    """Sums over one response under teacher forcing."""

    tokens: int
    agreed: float
    kl: float


def require_text_llm(model: MTBISALM) -> None:
    """
    Raises:
        ConfigError: the LLM's own weights were trained, so that the text LLM which was imitated is not in the model.
    """
    if trained := trained_in_llm(model):
        raise ConfigError(
            f"The LLM was trained itself ({trained[0]}, ...; model.freeze_params), and systems are compared with the "
            "text LLM as it was. Train LoRA adapters instead (model.lora), which the text LLM does without."
        )


class TextLLM:
    """What every system is compared with: the text LLM on the reference transcript.

    Its states are computed once for each stored response and kept for the next system, as far as ``max_bytes`` go.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def hidden(self, model: MTBISALM, reading: SystemBatch) -> Tensor:
        """States (R, H) that predict the stored responses of a batch."""
        keys = [(*e.teacher_prompt, -1, *e.response_ids) for e in reading.examples]
        missing = {key: e for e, key in zip(reading.examples, keys, strict=True) if key not in self.kept}
        fresh: dict[tuple[int, ...], Tensor] = {}
        if missing:
            examples = list(missing.values())
            responses = [e.response_ids for e in examples]
            states = text_hidden(model, [e.teacher_prompt for e in examples], responses, examples)
            fresh = dict(zip(missing, states.split([len(r) for r in responses]), strict=True))
        hidden = torch.cat([fresh[k] if k in fresh else self.kept[k].to(model.device) for k in keys])
        for key, own in fresh.items():
            size = own.numel() * own.element_size()
            if self.bytes + size <= self.max_bytes:
                self.kept[key] = own.to("cpu", copy=True)
                self.bytes += size
        return hidden


def against_the_text_llm(
    model: MTBISALM, system: System, reading: SystemBatch, text_llm: TextLLM
) -> list[TeacherForcedSums]:
    """Agreement with, and KL from, the text LLM on the reference transcript, over the stored responses.

    KL(text LLM || system) over the full vocabulary at temperature 1, in nats.
    """
    responses = [e.response_ids for e in reading.examples]
    hidden = system.hidden(reading, responses)
    teacher = text_llm.hidden(model, reading)
    ids = torch.tensor([t for r in responses for t in r], device=hidden.device)
    loss = imitation_loss(hidden, model.head(), ids, KL_ONLY, teacher_hidden=teacher)
    sizes = [len(r) for r in responses]
    parts = zip(sizes, loss.agreed.split(sizes), loss.per_token.split(sizes), strict=True)
    return [TeacherForcedSums(n, float(agreed.sum()), float(kl.sum())) for n, agreed, kl in parts]


def log_likelihoods(model: MTBISALM, system: System, reading: SystemBatch, responses: list[list[int]]) -> list[float]:
    """Log-probability in nats of one response (token ids) for each example."""
    hidden = system.hidden(reading, responses)
    ids = torch.tensor([t for r in responses for t in r], device=hidden.device)
    loss = imitation_loss(hidden, model.head(), ids, CROSS_ENTROPY)
    return [-float(part.sum()) for part in loss.per_token.split([len(r) for r in responses])]


def system_batches(
    system: System, questions: EvaluationSet, conversations: list[MTBIConversation], batch_size: int, title: str
) -> Iterator[SystemBatch]:
    """Batches of conversations as a system reads them, with a progress bar."""
    with console.progress(total=len(conversations), desc=title, unit="answer") as bar:
        for begin in range(0, len(conversations), batch_size):
            part = conversations[begin : begin + batch_size]
            reading = system.read(questions, part)
            if reading is not None:
                yield reading
            bar.update(len(part))
