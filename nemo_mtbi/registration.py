"""The plugin's whole contract with NeMo's registries; importing it registers everything, once.

- ``nemo_mtbi.*`` classes, and apex's AdamW, may be ``_target_``s of NeMo configurations.
- ``input_cfg`` type ``mtbi``.
- prompt formats ``chatml`` and ``chat_template``.
- how an :class:`MTBIConversation` is tokenized with any prompt format.
"""

from typing import Any

import numpy as np

from nemo_mtbi.data.chat_template import ChatTemplateFormat, dialect
from nemo_mtbi.process import collection_paused

with collection_paused():
    from nemo.collections.common.data.lhotse.cutset import data_type_parser
    from nemo.collections.common.data.prompt_fn import registered_prompt_format_fn
    from nemo.collections.common.prompts.formatter import Modality, PromptFormatter
    from nemo.core.classes import common

    from nemo_mtbi.data.conversation import INPUT_TYPE, MTBIConversation, read_mtbi
    from nemo_mtbi.data.rendering import PromptRenderer
from nemo_mtbi.data.target import Target
from nemo_mtbi.modules.fused_norm import FUSED_ADAM

TARGET_PREFIX = "nemo_mtbi."

for name in (TARGET_PREFIX, FUSED_ADAM):
    if name not in common.ALLOWED_TARGET_PREFIXES:
        common.ALLOWED_TARGET_PREFIXES.append(name)
common.ALLOWED_EXACT_CLASS_TARGETS.add(FUSED_ADAM)  # PyTorch's optimizers alone are allowed otherwise

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


class ChatTemplatePromptFormatter(ChatTemplateFormat, PromptFormatter):
    """The chat template that the LLM's own tokenizer carries, for NeMo's data pipeline too."""


@registered_prompt_format_fn(MTBIConversation)
def tokenize_mtbi_conversation(example: MTBIConversation, prompt: PromptFormatter, **_: Any) -> dict[str, Any]:
    """The text LLM's view of the example; the answer is the teacher's tokens as generated, never tokenized again.

    Nothing where the target knows its positions in this format, which is what batches are drawn by; then the loader's
    workers render the prompt.
    """
    target = example.target
    assert target is not None
    known = example.positions and target.rendering.startswith(
        Target.rendering_of(dialect(prompt.NAME, prompt.tokenizer.tokenizer), example.speech_position, "")
    )
    if known and not example.with_ids:
        return {}
    rendered = PromptRenderer(prompt.tokenizer, type(prompt)).render(example.messages())
    # Arrays: each tensor would travel to the loader's workers as a file of its own.
    context_ids = np.asarray(rendered.ids, dtype=np.int64)
    answer_ids = np.asarray(target.response_ids, dtype=np.int64)
    mask = np.arange(len(context_ids) + len(answer_ids)) >= len(context_ids)
    return {
        "input_ids": np.concatenate([context_ids, answer_ids]),
        "context_ids": context_ids,
        "answer_ids": answer_ids,
        "mask": mask,
        "rendered": rendered,
    }
