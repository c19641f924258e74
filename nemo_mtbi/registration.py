"""The plugin's whole contract with NeMo's registries; importing it registers everything, once.

- ``nemo_mtbi.*`` classes may be ``_target_``s of NeMo configurations.
- ``input_cfg`` type ``mtbi``.
- prompt formats ``chatml`` and ``chat_template``.
- how an :class:`MTBIConversation` is tokenized with any prompt format.
"""

from typing import Any

import torch
from jinja2 import TemplateError
from nemo.collections.common.data.lhotse.cutset import data_type_parser
from nemo.collections.common.data.prompt_fn import registered_prompt_format_fn
from nemo.collections.common.prompts.formatter import Modality, PromptFormatter
from nemo.core.classes import common

from nemo_mtbi.data.conversation import INPUT_TYPE, MTBIConversation, read_mtbi
from nemo_mtbi.data.rendering import PromptRenderer
from nemo_mtbi.errors import ConfigError, DataError

TARGET_PREFIX = "nemo_mtbi."

if TARGET_PREFIX not in common.ALLOWED_TARGET_PREFIXES:
    common.ALLOWED_TARGET_PREFIXES.append(TARGET_PREFIX)

data_type_parser(INPUT_TYPE)(read_mtbi)


class ChatMLPromptFormatter(PromptFormatter):
    """ChatML (SmolLM2, Qwen, Yi, ...) with an optional system turn and no default one."""

    NAME = "chatml"
    OUTPUT_ROLE = "assistant"
    INFERENCE_PREFIX = "<|im_start|>assistant\n"
    TEMPLATE = {
        role: {"template": f"<|im_start|>{role}\n|message|<|im_end|>\n", "slots": {"message": Modality.Text}}
        for role in ("system", "user", "assistant")
    }


class ChatTemplatePromptFormatter(PromptFormatter):
    """The chat template that the LLM's own tokenizer carries."""

    NAME = "chat_template"
    OUTPUT_ROLE = "assistant"
    TEMPLATE = {
        role: {"template": "|message|", "slots": {"message": Modality.Text}} for role in ("system", "user", "assistant")
    }

    def encode_dialog(self, turns: list[dict], **kwargs: Any) -> dict[str, torch.Tensor]:
        hf: Any = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        if not getattr(hf, "chat_template", None):
            raise ConfigError(
                f"The tokenizer {hf.name_or_path!r} has no chat template. Use an instruction-tuned LLM, or set "
                f"prompt_format to one of {', '.join(sorted(PromptFormatter._REGISTERED_FORMATTERS))}."
            )
        messages = [{"role": t["role"], "content": t.get("content") or t["slots"]["message"]} for t in turns]
        answered = messages[-1]["role"] == self.OUTPUT_ROLE
        context = messages[:-1] if answered else messages
        try:
            text = hf.apply_chat_template(context, tokenize=False, add_generation_prompt=True, **kwargs)
        except TemplateError as error:  # e.g. a template without a system role
            raise DataError(f"The chat template of {hf.name_or_path!r} refuses this dialog: {error}.") from error
        context_ids = torch.tensor(self._apply_tokenizer(text), dtype=torch.long)
        if not answered:
            return {"input_ids": context_ids, "context_ids": context_ids}
        full = hf.apply_chat_template(messages, tokenize=False, **kwargs)
        if not full.startswith(text):
            raise ConfigError(
                "The chat template renders earlier turns differently once they are answered, so answers cannot be "
                "separated from it. Set prompt_format to a NeMo prompt format instead."
            )
        answer_ids = torch.tensor(self._apply_tokenizer(full[len(text) :]), dtype=torch.long)
        mask = torch.cat([torch.zeros_like(context_ids), torch.ones_like(answer_ids)]).bool()
        input_ids = torch.cat([context_ids, answer_ids])
        return {"input_ids": input_ids, "context_ids": context_ids, "answer_ids": answer_ids, "mask": mask}


@registered_prompt_format_fn(MTBIConversation)
def tokenize_mtbi_conversation(example: MTBIConversation, prompt: PromptFormatter, **_: Any) -> dict[str, Any]:
    """The text LLM's view of the example; the answer is the teacher's tokens as generated, never tokenized again."""
    assert example.target is not None
    rendered = PromptRenderer(prompt.tokenizer, type(prompt)).render(example.messages())
    context_ids = torch.tensor(rendered.ids, dtype=torch.long)
    answer_ids = torch.tensor(example.target.response_ids, dtype=torch.long)
    mask = torch.cat([torch.zeros_like(context_ids), torch.ones_like(answer_ids)]).bool()
    return {
        "input_ids": torch.cat([context_ids, answer_ids]),
        "context_ids": context_ids,
        "answer_ids": answer_ids,
        "mask": mask,
        "rendered": rendered,
    }
