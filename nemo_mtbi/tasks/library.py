"""The task library: YAML files under ``conf/tasks`` (or a folder of the user's) to prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from nemo_mtbi.errors import ConfigError

DEFAULT_FOLDER = Path(__file__).parents[1] / "conf" / "tasks"
GROUPS, SPLITS = ("train", "held_out", "control", "voice"), ("seen", "held_out")
PROMPT_KEYS = {"id", "text", "language"}
FORM_KEYS = {name: {"value"} for name in ("max_words", "min_words", "language")} | {
    "list": {"min_items", "max_items", "item_words"}
}
FORMS = ("any", "one_word", "yes_no", "choice", "list", "max_words", "min_words", "question", "language")
SANDBOX = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False)


@dataclass(frozen=True)
class Prompt:
    """One wording. ``split``: ``seen`` in training or ``held_out`` for prompt generalization."""

    id: str
    text: str
    split: str
    language: str = "en"


@dataclass(frozen=True)
class PrepareStep:
    """An earlier turn on the transcript whose answer fills the placeholder ``variable``."""

    variable: str
    prompt: str
    max_new_tokens: int = 32


@dataclass(frozen=True)
class Task:
    """One task; see ``docs/tasks.md`` for the YAML.

    ``answer``: a template of the answer, with ``transcript``; the LLM is then not asked.
    ``needs``: attributes of the voice that it asks about; ``described``: it asks about the voice as a whole;
    ``utterances``: that the recording has at least.
    """

    name: str
    group: str
    prompts: list[Prompt]
    metric: str = "rouge_l"
    form: dict[str, Any] = field(default_factory=lambda: {"kind": "any"})
    max_new_tokens: int = 64
    weight: float = 1.0
    variables: dict[str, list[str]] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)
    prepare: list[PrepareStep] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    described: bool = False
    utterances: int = 1
    answer: str | None = None

    @property
    def about_the_voice(self) -> bool:
        """The text LLM has to know more than the words."""
        return self.described or bool(self.needs)

    def select(self, split: str, languages: list[str] | None = None) -> list[Prompt]:
        """Prompts of one split (``seen``, ``held_out`` or ``all``) in the given languages (default: English)."""
        wanted = languages or ["en"]
        return [p for p in self.prompts if split in ("all", p.split) and p.language in wanted]


def render_template(template: str, values: dict[str, Any]) -> str:
    """Fill a prompt's placeholders in a sandboxed Jinja2 environment.

    Raises:
        ConfigError: a syntax error, or a placeholder without a value.
    """
    try:
        return SANDBOX.from_string(template).render(values).strip()
    except Exception as error:  # a template's expressions may raise anything
        raise ConfigError(
            f"Prompt template {template!r}: {error}. Known placeholders: {', '.join(values) or 'none'}."
        ) from error


def load_task(path: Path) -> Task:
    """One YAML file.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        wordings = raw.pop("prompts", {})
        if unknown := set(wordings) - set(SPLITS):
            raise ConfigError(
                f"Task file {path}: prompts has no split {sorted(map(str, unknown))[0]!r}, only {SPLITS}."
            )
        for wording in (p for split in wordings.values() for p in split or ()):
            if unknown := set(wording) - PROMPT_KEYS:
                raise ConfigError(
                    f"Task file {path}: a prompt has no {min(unknown)!r} ({wording.get('id')!r}); it has "
                    f"{', '.join(sorted(PROMPT_KEYS))}."
                )
        prompts = [
            Prompt(p["id"], p["text"], split, p.get("language", "en"))
            for split in SPLITS
            for p in wordings.get(split) or ()
        ]
        steps = [PrepareStep(**s) for s in raw.pop("prepare", [])]
        task = Task(prompts=prompts, prepare=steps, **raw)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Task file {path}: {type(error).__name__}: {error}") from error
    if problem := _type_problem(task):
        raise ConfigError(f"Task file {path}: {problem}.")
    if task.name != path.stem or task.group not in GROUPS or not task.prompts or task.form.get("kind") not in FORMS:
        raise ConfigError(
            f"Task file {path}: name must be {path.stem!r}, group one of {GROUPS}, form.kind one of {FORMS}, and there "
            f"must be prompts (got name={task.name!r}, group={task.group!r}, form={task.form}, "
            f"{len(task.prompts)} prompts)."
        )
    if slashed := [p.id for p in task.prompts if "/" in p.id]:
        raise ConfigError(f"Task file {path}: prompt id {slashed[0]!r} must not hold a slash.")
    values: dict[str, Any] = {k: v[0] for k, v in task.variables.items()} | {"choices": task.choices}
    values |= {s.variable: "..." for s in task.prepare}
    try:
        for template in [p.text for p in task.prompts] + [s.prompt for s in task.prepare]:
            render_template(template, values)
        if task.answer is not None:
            render_template(task.answer, values | {"transcript": "..."})
        if task.form["kind"] == "language":
            render_template(str(task.form["value"]), values)
    except ConfigError as error:
        raise ConfigError(f"Task file {path}: {error}") from error
    return task


def _type_problem(task: Task) -> str | None:
    """What YAML has made of a value that was meant otherwise (an unquoted ``no`` is false)."""
    lists = {"choices": task.choices, "needs": task.needs}
    if isinstance(task.variables, dict):
        lists |= {f"variables.{name}": values for name, values in task.variables.items()}
        if empty := [name for name, values in task.variables.items() if values == []]:
            return f"variables.{empty[0]} is empty"
    else:
        return f"variables is {task.variables!r}, no mapping of names to lists"
    for name, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return f"{name} is {values!r}; give a list of strings, with words such as yes, no and numbers in quotes"
    texts = [(f"prompt {p.id!r}: {key}", getattr(p, key)) for p in task.prompts for key in ("id", "text", "language")]
    for name, text in [*texts, *((f"prepare {s.variable!r}", s.prompt) for s in task.prepare)]:
        if not isinstance(text, str):
            return f"{name} is {text!r}; put it in quotes"
    counts = {"max_new_tokens": task.max_new_tokens, "utterances": task.utterances}
    counts |= {f"max_new_tokens of {s.variable!r}": s.max_new_tokens for s in task.prepare}
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            return f"{name} is {count!r}; give a whole number of at least 1"
    if not isinstance(task.form, dict):
        return f"form is {task.form!r}; give a mapping with kind"
    if task.form.get("kind") in ("max_words", "min_words") and type(task.form.get("value")) is not int:
        return f"form {task.form['kind']} needs a value, a whole number of words"
    if task.form.get("kind") == "language" and not isinstance(task.form.get("value"), str):
        return "form language needs a value, the language or its placeholder"
    if type(task.form.get("min_items", 1)) is not int:
        return f"form.min_items is {task.form['min_items']!r}; give a whole number"
    if unknown := set(task.form) - {"kind", *FORM_KEYS.get(str(task.form.get("kind")), ())}:
        return f"form {task.form.get('kind')} has no {min(map(str, unknown))!r}"
    if task.form.get("kind") == "choice" and not task.choices:
        return "form choice needs choices"
    twice = [p.id for p in task.prompts if sum(p.id == other.id for other in task.prompts) > 1]
    return f"the prompt id {twice[0]!r} is there twice" if twice else None


def load_library(folders: Sequence[str | Path] | None = None) -> dict[str, Task]:
    """The shipped tasks and those of further folders, by name.

    A task of a later folder replaces one of the same name.
    """
    library: dict[str, Task] = {}
    for folder in [DEFAULT_FOLDER, *(folders or [])]:
        files = sorted(Path(folder).glob("*.yaml"))
        if not files:
            raise ConfigError(f"No task file (*.yaml) in {folder}.")
        library |= {task.name: task for task in map(load_task, files)}
    owners: dict[str, str] = {}
    for task in library.values():
        for prompt in task.prompts:
            if (other := owners.setdefault(prompt.id, task.name)) != task.name:
                raise ConfigError(f"The prompt id {prompt.id!r} is that of the tasks {other} and {task.name}.")
    return library


def comparable(library: dict[str, Task], names: Iterable[str]) -> list[str]:
    """Of some tasks, those with answers of the text LLM to a transcript, to compare with: no control tasks, none that
    gives its answer itself or asks about the voice, and none of another library."""
    known = (library[name] for name in sorted(set(names) & library.keys()))
    return [t.name for t in known if t.group != "control" and t.answer is None and not t.about_the_voice]


def select_tasks(library: dict[str, Task], names: list[str] | None, group: str | None = "train") -> list[Task]:
    """Tasks by name, or all of a group.

    Raises:
        ConfigError: an unknown name.
    """
    if names is None:
        return [t for t in library.values() if group is None or t.group == group]
    unknown = [n for n in names if n not in library]
    if unknown:
        raise ConfigError(f"Unknown task {', '.join(unknown)}. Known tasks: {', '.join(sorted(library))}.")
    return [library[n] for n in names]
