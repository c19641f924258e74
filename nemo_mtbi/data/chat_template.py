"""The Jinja chat template that an export carries: it writes what training and inference of the model read."""

from typing import Any

from nemo.collections.common.prompts import PromptFormatter

from nemo_mtbi.data.rendering import PromptRenderer
from nemo_mtbi.errors import ConfigError

PROBES = (
    [("user", "What is it?")],
    [("user", "What is it?"), ("assistant", "A lamp."), ("user", "Which one?")],
    [("system", "Be short."), ("user", "What is it?")],
)


def chat_template(tokenizer: Any, formatter: type[PromptFormatter]) -> str:
    """The chat template of a prompt format: the tokenizer's own, or a NeMo format's templates as Jinja.

    Args:
        tokenizer: NeMo ``AutoTokenizer`` of the LLM.
        formatter: a prompt format.

    Raises:
        ConfigError: the format does something that its templates do not say, so that no Jinja template equals it.
    """
    hf = tokenizer.tokenizer
    if formatter.NAME == "chat_template":
        return str(hf.chat_template)
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


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
