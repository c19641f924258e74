"""The frozen LLM as the objective needs it: hidden states without logits, and its output layer."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from nemo_mtbi.losses.imitation import Head
from nemo_mtbi.losses.vocabulary import WHOLE_VOCABULARY, VocabularyShard


def causal_lm(llm: nn.Module) -> Any:
    """The Transformers ``...ForCausalLM`` under a possible LoRA wrapper."""
    return llm.base_model.model if isinstance(llm, PeftModel) else llm


def hidden_states(llm: nn.Module, inputs_embeds: Tensor) -> Tensor:
    """Last hidden states (B, L, H) of right-padded embeddings (B, L, H).

    No mask is passed: under causal attention, padding on the right never reaches a valid position, and the attention
    kernels then take their fastest path.
    """
    return causal_lm(llm).model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


def output_head(llm: nn.Module, shard: VocabularyShard = WHOLE_VOCABULARY) -> Head:
    """The output layer with the logit scaling and soft-capping of the model's configuration."""
    lm = causal_lm(llm)
    config = lm.config
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = config.logit_scale
    return Head(lm.lm_head.weight, lm.lm_head.bias, scale, getattr(config, "final_logit_softcapping", None), shard)


def without_adapters(llm: nn.Module) -> AbstractContextManager[Any]:
    """The teacher is the LLM without LoRA."""
    return llm.disable_adapter() if isinstance(llm, PeftModel) else nullcontext()


def pad_right(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, L) padded with 0 on the right, and their lengths (B,)."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids.to(device), torch.tensor([len(s) for s in sequences], device=device)


@torch.no_grad()
def teacher_hidden_states(
    llm: nn.Module, embed_tokens: nn.Module, prompts: list[list[int]], responses: list[list[int]]
) -> Tensor:
    """The text LLM's hidden states (R, H) at the positions before each response token; no gradient, no logits.

    Args:
        prompts: token ids with the transcript in place of speech.
        responses: the teacher's answers; the last token is never an input.
    """
    device = next(embed_tokens.parameters()).device
    ids, lengths = pad_right([p + r[:-1] for p, r in zip(prompts, responses, strict=True)], device)
    with without_adapters(llm):
        hidden = hidden_states(llm, embed_tokens(ids))
    width = ids.shape[1]
    rows = [
        i * width + len(p) - 1 + j
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        for j in range(len(r))
    ]
    return hidden.flatten(0, 1)[torch.tensor(rows, device=device)]
