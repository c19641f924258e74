"""Chat templates: as a prompt format, and the one that an export carries, which writes what training read."""

import hashlib
import re
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from nemo_mtbi.data.rendering import PromptRenderer
from nemo_mtbi.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nemo.collections.common.prompts import PromptFormatter

# Of LLMs that think before they answer (Qwen3, SmolLM3, GLM): not within the budget of a task, nor for a listener who
# waits. Other templates do not look at it.
WITHOUT_THINKING = {"enable_thinking": False}
# Today, for templates that name it (Llama 3.2, SmolLM3, Mistral): the same whenever targets are made, trained and used.
# The date that Llama's template says where it knows none.
TODAY = datetime(2024, 7, 26)
PROBES = (
    [("user", "What is it?")],
    [("user", "What is it?"), ("assistant", "A lamp."), ("user", "Which one?")],
    [("system", "Be short."), ("user", "What is it?")],
)


class ChatTemplateFormat:
    """The prompt format of the tokenizer's own chat template; the methods are those of NeMo's ``PromptFormatter``.

    Args:
        tokenizer: with ``text_to_ids``, around a Hugging Face tokenizer.
        defaults: NeMo's default turns; a chat template has its own.
    """

    NAME = "chat_template"
    OUTPUT_ROLE = "assistant"
    TEMPLATE = {role: {"template": "|message|", "slots": {"message": str}} for role in ("system", "user", "assistant")}

    def __init__(self, tokenizer: Any, defaults: list[dict] | None = None) -> None:
        self.tokenizer = tokenizer
        self._defaults = defaults or []

    @classmethod
    def get_roles(cls) -> list[str]:
        return list(cls.TEMPLATE)

    @classmethod
    def get_slots(cls, role: str) -> dict[str, Any]:
        return dict(cls.TEMPLATE[role]["slots"])  # type: ignore[arg-type]

    def encode_dialog(self, turns: list[dict], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Turns -> ``context_ids`` up to the answer; with an assistant's last turn also ``answer_ids`` and ``mask``.

        Raises:
            ConfigError: no chat template, or one that renders a dialog otherwise once it is answered.
            DataError: a dialog that the template refuses.
        """
        hf: Any = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        if not getattr(hf, "chat_template", None):
            raise ConfigError(
                f"The tokenizer {hf.name_or_path!r} has no chat template. Use an instruction-tuned LLM, or set "
                "prompt_format to one of NeMo's prompt formats."
            )
        kwargs = WITHOUT_THINKING | kwargs
        if "strftime_now" in str(hf.chat_template):
            kwargs["chat_template"] = with_fixed_date(str(hf.get_chat_template()))
        messages = [{"role": t["role"], "content": t.get("content") or t["slots"]["message"]} for t in turns]
        answered = messages[-1]["role"] == self.OUTPUT_ROLE
        context = messages[:-1] if answered else messages
        try:
            text = hf.apply_chat_template(context, tokenize=False, add_generation_prompt=True, **kwargs)
        except TemplateError as error:  # e.g. a template without a system role
            raise DataError(f"The chat template of {hf.name_or_path!r} refuses this dialog: {error}.") from error
        context_ids = torch.tensor(self.tokenizer.text_to_ids(text), dtype=torch.long)
        if not answered:
            return {"input_ids": context_ids, "context_ids": context_ids}
        full = hf.apply_chat_template(messages, tokenize=False, **kwargs)
        if not full.startswith(text):
            raise ConfigError(
                "The chat template renders earlier turns differently once they are answered, so answers cannot be "
                "separated from it. Set prompt_format to a NeMo prompt format instead."
            )
        answer_ids = torch.tensor(self.tokenizer.text_to_ids(full[len(text) :]), dtype=torch.long)
        mask = torch.cat([torch.zeros_like(context_ids), torch.ones_like(answer_ids)]).bool()
        input_ids = torch.cat([context_ids, answer_ids])
        return {"input_ids": input_ids, "context_ids": context_ids, "answer_ids": answer_ids, "mask": mask}


def dialect(prompt_format: str, tokenizer: Any) -> str:
    """A prompt format's name, with what else decides what it writes for a Hugging Face ``tokenizer``."""
    template = getattr(tokenizer, "chat_template", None)
    silenced = prompt_format == ChatTemplateFormat.NAME and thinks(template)
    return f"{prompt_format} without thinking" if silenced else prompt_format


def template_digest(tokenizer: Any) -> str | None:
    """Digest of a Hugging Face tokenizer's chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.blake2b(str(template).encode(), digest_size=12).hexdigest() if template else None


def thinks(template: str | dict[str, str] | None) -> bool:
    """Whether a chat template looks at ``WITHOUT_THINKING``."""
    return any(name in str(template) for name in WITHOUT_THINKING)


def chat_template(tokenizer: Any, formatter: "type[PromptFormatter]") -> str:
    """The chat template of a prompt format: the tokenizer's own, or a NeMo format's templates as Jinja.

    Args:
        tokenizer: NeMo ``AutoTokenizer`` of the LLM.
        formatter: a prompt format.

    Raises:
        ConfigError: the format does something that its templates do not say, so that no Jinja template equals it.
    """
    hf = tokenizer.tokenizer
    if formatter.NAME == ChatTemplateFormat.NAME:
        own = with_fixed_date(str(hf.get_chat_template()))  # of several, the default one
        return f"{{%- set enable_thinking = enable_thinking | default(false) -%}}{own}" if thinks(own) else own
    start = hf.bos_token if formatter.INSERT_BOS else ""
    start += formatter.TEMPLATE.get("preamble", {}).get("template", "")
    branches = []
    for role in formatter.get_roles():
        slots = formatter.get_slots(role)
        if len(slots) == 1:
            before, _, after = formatter.get_template(role).partition(f"|{next(iter(slots))}|")
            written = f"{{{{ {_quoted(before)} + message['content'] + {_quoted(after)} }}}}"
            branches.append(f"if message['role'] == {_quoted(role)} %}}{written}")
    turns = "{% " + "{% el".join(branches) + "{% endif %}"
    prefix = f"{{% if add_generation_prompt %}}{{{{ {_quoted(formatter.INFERENCE_PREFIX or '')} }}}}{{% endif %}}"
    template = f"{{{{ {_quoted(start)} }}}}{{% for message in messages %}}{turns}{{% endfor %}}{prefix}"
    renderer = PromptRenderer(tokenizer, formatter)
    for probe in PROBES:
        if not {role for role, _ in probe} <= set(formatter.get_roles()):
            continue
        messages = [{"role": role, "content": text} for role, text in probe]
        ids = hf.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, return_dict=False)
        if list(ids) != renderer.render([{"role": role, "content": [text]} for role, text in probe]).ids:
            raise ConfigError(
                f"No chat template equals the prompt format {formatter.NAME!r} with this tokenizer, so clients that "
                "read the export's template would prompt it differently. Use prompt_format=chat_template."
            )
    return template


@lru_cache
def with_fixed_date(template: str) -> str:
    """A template that names :data:`TODAY` whenever it is used."""
    formats = dict.fromkeys(found[2] for found in re.finditer(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template))
    if not formats:
        return template
    cases = "{% el".join(f"if format == {_quoted(own)} %}}{TODAY.strftime(own)}" for own in formats)
    return f"{{%- macro strftime_now(format) -%}}{{% {cases}{{% endif %}}{{%- endmacro -%}}{template}"


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
