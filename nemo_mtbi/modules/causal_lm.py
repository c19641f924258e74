"""Transformers' causal LM as the objective needs it: body and output layer apart, with LoRA or without."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import GenerationConfig

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.vocabulary import WHOLE_VOCABULARY, VocabularyShard

RECOMPUTATION = "recomputation"  # of an LLM: the context_fn of torch.utils.checkpoint that its layers need


def causal_lm(llm: Any) -> Any:
    """The Transformers ``...ForCausalLM`` under a possible LoRA wrapper."""
    return llm.base_model.model if has_adapters(llm) else llm


def has_adapters(llm: Any) -> bool:
    """Whether PEFT wraps the LLM (LoRA); where it is not imported, nothing is wrapped."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(llm, peft.PeftModel)


_borrowers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_borrowing = Lock()


@contextmanager
def lent_embedding(model: Any) -> Iterator[None]:
    """``model.llm`` with the embedding that SALM keeps beside it, as Transformers' ``generate`` needs it.

    Several threads may have it at a time; the last one gives it back.
    """
    body = causal_lm(model.llm).model
    with _borrowing:
        _borrowers[body] = _borrowers.get(body, 0) + 1
        body.embed_tokens = model.embed_tokens
    try:
        yield
    finally:
        with _borrowing:
            _borrowers[body] -= 1
            if not _borrowers[body]:
                del body.embed_tokens


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing in the module is trained."""
    return not any(p.requires_grad for p in module.parameters())


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


def read_generation_config(llm: Any, folder: str | Path) -> None:
    """Give an LLM that was built from its configuration alone what its ``generation_config.json`` says, if it has one.

    Some LLMs name the tokens that end an answer there only.
    """
    if (found := generation_config_of(folder)) is not None:
        causal_lm(llm).generation_config = found


def generation_config_of(folder: str | Path) -> GenerationConfig | None:
    """``generation_config.json`` of an LLM; None without one."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None


def stop_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the LLM's own (a list, a number or nothing), ascending.

    Args:
        tokenizer: Transformers' tokenizer.
        generation_config: of the LLM, or None.

    Raises:
        ConfigError: there is none, so that no answer would ever end.
    """
    own = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])}
    found = sorted(i for i in ids if i is not None)
    if not found:
        raise ConfigError(
            "Neither the tokenizer nor the LLM's generation_config names a token that ends an answer (eos_token_id)."
        )
    return found


def end_of_turn(tokenizer: Any, generation_config: Any) -> int:
    """The token that ends an assistant's turn: what the chat template writes after an answer, else the LLM's own.

    Raises:
        ConfigError: see :func:`stop_ids`.
    """
    ends = stop_ids(tokenizer, generation_config)
    if getattr(tokenizer, "chat_template", None):
        dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer.apply_chat_template(dialog, tokenize=True, return_dict=False)
        written = [i for i in ids if i in ends]
        if written:
            return written[-1]
    own = getattr(generation_config, "eos_token_id", None)
    return (own[0] if isinstance(own, list | tuple) else own) or ends[0]


def checkpoint_activations(llm: nn.Module) -> None:
    """Let every layer keep only its input for the backward pass, although the frozen LLM is in evaluation mode."""
    lm = causal_lm(llm)
    if not lm.is_activation_checkpointing:
        context = {"context_fn": getattr(lm, RECOMPUTATION)} if hasattr(lm, RECOMPUTATION) else {}
        lm.gradient_checkpointing_enable({"use_reentrant": False, **context})
    for module in lm.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of this module alone: dropout inside stays off


def without_adapters(llm: Any) -> AbstractContextManager[Any]:
    """The teacher is the LLM without LoRA."""
    return llm.disable_adapter() if has_adapters(llm) else nullcontext()


def used_and_trained(parameters: Iterable[nn.Parameter], config: Any) -> tuple[float, float]:
    """Entries of the matrices that a position is multiplied with, and of those that are trained.

    Experts are kept together in three dimensions; a position goes to some of them.
    """
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    sizes = [(p.numel() * (share if p.ndim == 3 else 1), p.requires_grad) for p in parameters if p.ndim in (2, 3)]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
