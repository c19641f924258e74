"""Which prompts a cut is asked: tasks and wordings drawn by its id, rendered as in training."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lhotse.cut import Cut
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_mtbi import registration as registration  # the prompt formats
from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.chat_template import dialect
from nemo_mtbi.data.description import DescribedText, Description
from nemo_mtbi.data.messages import NOTHING_HEARD, user_message
from nemo_mtbi.data.rendering import PromptRenderer, RenderedPrompt, Spoken
from nemo_mtbi.data.target import NO_SPEECH, Target, is_no_speech
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io.text import language_code
from nemo_mtbi.modules.causal_lm import end_of_turn, generation_config_of
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained
from nemo_mtbi.targets.config import TargetsConfig, decoded_by
from nemo_mtbi.targets.decoder import Request
from nemo_mtbi.tasks.library import PrepareStep, Task, load_library, render_template, select_tasks

PROBLEM, UNDESCRIBED = "_problem", "undescribed"
Values = dict[tuple[str, str], dict[str, Any]]  # by (cut id, task)


@dataclass(frozen=True)
class Job:
    """One answer to get: its request and what the target will say about it."""

    request: Request
    cut_id: str
    transcript: str
    task: str
    prompt_id: str
    prompt: str
    languages: tuple[str, ...]
    values: dict[str, Any]
    problem: tuple[str, str] | None = None  # name and reason, if it cannot be asked
    answer: str | None = None  # where the text LLM is not asked
    described: Description | None = None  # what it reads in the transcript's place, if that is another text
    positions: tuple[int, ...] = ()  # of the prompt with the transcript


class PromptDrawer:
    """Draws jobs for cuts. Draws depend on the seed, the cut's id and the task, not on the order of the cuts.

    Raises:
        ConfigError: an unknown task, or a tokenizer without the prompt format.
    """

    def __init__(self, config: TargetsConfig) -> None:
        self.config = config
        self.tasks: list[Task] = select_tasks(load_library(config.task_folders), config.task_names)
        self.by_name = {t.name: t for t in self.tasks}
        own = config.description
        self.described = None if own.share is None else DescribedText(own.template, own.least)
        if self.described is None and (about := [t.name for t in self.tasks if t.about_the_voice]):
            raise ConfigError(
                f"Task {about[0]} asks about the voice, of which the text LLM reads nothing: set description.share "
                "(and prepare with describe.enabled=true), or leave the task out."
            )
        self.llm = resolve_pretrained(config.llm)
        self.teacher = fingerprint(self.llm)
        self.tokenizer = AutoTokenizer(self.llm, use_fast=True)
        self.dialect = dialect(config.prompt_format, self.tokenizer.tokenizer)
        self.rendering = Target.rendering_of(self.dialect, config.speech_position, self.teacher)
        self.renderer = PromptRenderer(self.tokenizer, PromptFormatter.resolve(config.prompt_format))
        splits = {config.prompt_split, *config.splits.values()}
        for task in self.tasks:
            if empty := [s for s in sorted(splits) if not task.select(s, config.languages)]:
                raise ConfigError(
                    f"Task {task.name} has no prompt in split {empty[0]!r} and languages "
                    f"{', '.join(config.languages)}. "
                    "Splits are seen, held_out and all; add languages, or choose other tasks."
                )
        probe = user_message("Repeat.", Spoken("Some words."), config.speech_position)
        self.renderer.render([probe])  # fails early, if at all

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an answer."""
        return end_of_turn(self.tokenizer.tokenizer, generation_config_of(self.llm))

    def tasks_of(self, cut: Cut, name: str) -> list[Task]:
        """Tasks drawn for one cut, of those that it has enough utterances for."""
        wanted = self.config.tasks_per_cut.get(name, len(self.tasks))
        rng = random.Random(f"{self.config.seed}/{cut.id}")
        count = int(wanted) + (rng.random() < wanted % 1 if wanted % 1 else 0)
        utterances = sum(bool(s.text) for s in cut.supervisions)
        tasks = [task for task in self.tasks if task.utterances <= max(1, utterances)]
        return rng.sample(tasks, min(count, len(tasks)))

    def prepare(self, cuts: list[Cut], name: str, answer: Callable[[list[Request]], dict[str, str]]) -> Values:
        """Values of the prompts' placeholders: drawn ones, and answers to the preparing turns.

        Args:
            answer: gives the text LLM's answers to requests, by key.
        """
        values: Values = {}
        waiting: list[tuple[Cut, Task]] = []
        for cut in filter(transcript, cuts):
            for task in self.tasks_of(cut, name):
                rng = random.Random(f"{self.config.seed}/{cut.id}/{task.name}/values")
                drawn = {k: rng.choice(v) for k, v in task.variables.items()}
                values[cut.id, task.name] = drawn | {"choices": task.choices}
                if task.prepare:
                    waiting.append((cut, task))
        for turn in range(max((len(t.prepare) for _, t in waiting), default=0)):
            asked = [(c, t, t.prepare[turn]) for c, t in waiting if turn < len(t.prepare)]
            requests = [self._prepared_request(c, t, s, values) for c, t, s in asked]
            answers = answer([r for r in requests if r.key])
            for (cut, task, step), request in zip(asked, requests, strict=True):
                line = one_line(answers.get(request.key, ""))
                values[cut.id, task.name][step.variable] = line
                if not line:
                    values[cut.id, task.name][PROBLEM] = (
                        f"the turn that prepares {step.variable!r} gave no text, or did not end"
                    )
        return values

    def _prepared_request(self, cut: Cut, task: Task, step: PrepareStep, values: Values) -> Request:
        try:
            prompt = render_template(step.prompt, values[cut.id, task.name])
            return self.request(self.rendered(prompt, transcript(cut)), step.max_new_tokens)
        except DataError:
            return Request("", [], 0)  # cannot be rendered: its job is rejected for it

    def jobs(self, cut: Cut, name: str, values: Values) -> list[Job]:
        """The prompts that one cut is asked; none if it has no transcript."""
        if is_no_speech(cut):
            return self._silent_jobs(cut, name)
        text = transcript(cut)
        if not text:
            return []
        split = self.config.splits.get(name, self.config.prompt_split)
        limit = self.config.max_new_tokens or max(t.max_new_tokens for t in self.tasks)
        spoken = [language_code(s.language) for s in cut.supervisions if s.language]
        jobs = []
        for task in self.tasks_of(cut, name):
            prompts = task.select(split, self.config.languages)
            rng = random.Random(f"{self.config.seed}/{cut.id}/{task.name}")
            count = self.config.prompts_per_task or len(prompts)
            for prompt in rng.sample(prompts, min(count, len(prompts))):
                own = values[cut.id, task.name]
                problem = ("prepare", own[PROBLEM]) if PROBLEM in own else None
                filled = render_template(prompt.text, own)
                described = self._described(cut, task, prompt.id)
                if described is None and task.about_the_voice:
                    problem = (UNDESCRIBED, f"not all of {', '.join(task.needs) or 'any attribute'} is known")
                request, positions = Request("", [], 0), []
                if problem is None:
                    try:
                        read = text if described is None else described.text
                        rendered = self.rendered(filled, read)
                        request = self.request(rendered, min(task.max_new_tokens, limit))
                        positions = (rendered if read == text else self.rendered(filled, text)).positions
                    except DataError as error:
                        problem = ("rendering", str(error))
                answer = None
                if task.answer is not None and problem is None:
                    answer = render_template(task.answer, own | {"transcript": text})
                    request = given(request, answer)
                languages = tuple(dict.fromkeys([prompt.language, *spoken]))
                what = task.name, prompt.id, filled, languages, own, problem
                jobs.append(Job(request, cut.id, text, *what, answer, described, tuple(positions)))
        return jobs

    def _described(self, cut: Cut, task: Task, prompt_id: str) -> Description | None:
        """What the text LLM reads; None: the transcript alone, or, of a task about the voice, it cannot be asked."""
        if self.described is None:
            return None
        key = f"{self.config.seed}/{cut.id}/{task.name}/{prompt_id}"
        if task.about_the_voice:
            return self.described(cut, key, task.needs)
        if random.Random(f"{key}/described").random() >= (self.config.description.share or 0.0):
            return None
        return self.described(cut, key)

    def _silent_jobs(self, cut: Cut, name: str) -> list[Job]:
        """One wording of each task that is drawn and has no placeholders, with the answer to audio without speech."""
        split, answer = self.config.splits.get(name, self.config.prompt_split), self.config.nothing_heard_answer
        jobs = []
        for task in self.tasks_of(cut, name):
            if task.prepare or task.variables or task.choices:
                continue
            rng = random.Random(f"{self.config.seed}/{cut.id}/{task.name}")
            prompt = rng.choice(task.select(split, self.config.languages))
            rendered = self.rendered(prompt.text, NOTHING_HEARD)
            request = given(self.request(rendered, task.max_new_tokens), answer)
            where = cut.id, "", NO_SPEECH, prompt.id, prompt.text
            jobs.append(Job(request, *where, (), {}, answer=answer, positions=tuple(rendered.positions)))
        return jobs

    def request(self, rendered: RenderedPrompt, max_new_tokens: int) -> Request:
        """A prompt under its content key: a hash of everything that decides a greedy answer."""
        ids = rendered.ids
        content = json.dumps([ids, self.teacher, decoded_by(self.config), max_new_tokens])
        return Request(hashlib.blake2b(content.encode(), digest_size=12).hexdigest(), ids, max_new_tokens)

    def rendered(self, prompt: str, text: str) -> RenderedPrompt:
        return self.renderer.render([user_message(prompt, Spoken(text), self.config.speech_position)])


def given(request: Request, answer: str) -> Request:
    """A request whose answer is not the LLM's: it counts in the key."""
    key = hashlib.blake2b(f"{request.key}/{answer}".encode(), digest_size=12).hexdigest()
    return Request(key, request.prompt_ids, request.max_new_tokens)


def one_line(text: str) -> str:
    """A prepared answer as it can stand inside a prompt: its first line without quotation marks."""
    lines = text.strip().splitlines()
    return lines[0].strip().strip("\"'“”").strip() if lines else ""
