"""Transformers' causal LM as the objective needs it: body and output layer apart, with LoRA or without."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from torch import nn

from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.vocabulary import WHOLE_VOCABULARY, VocabularyShard


def causal_lm(llm: nn.Module) -> Any:
    """The Transformers ``...ForCausalLM`` under a possible LoRA wrapper."""
    return llm.base_model.model if isinstance(llm, PeftModel) else llm


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


def checkpoint_activations(llm: nn.Module) -> None:
    """Let every layer keep only its input for the backward pass, although the frozen LLM is in evaluation mode."""
    lm = causal_lm(llm)
    if not lm.is_activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    for module in lm.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of this module alone: dropout inside stays off


def without_adapters(llm: nn.Module) -> AbstractContextManager[Any]:
    """The teacher is the LLM without LoRA."""
    return llm.disable_adapter() if isinstance(llm, PeftModel) else nullcontext()
