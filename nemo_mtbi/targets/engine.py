"""Engines that write the text LLM's answers. An engine takes rendered prompts and returns token ids."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.causal_lm import stop_ids
from nemo_mtbi.pretrained.offline import resolve_pretrained
from nemo_mtbi.targets.decoder import Answer, RefillDecoder, Request

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class Engine(Protocol):
    """What generate_targets needs of an engine.

    ``independent``: an answer does not depend, to the last bit, on the other requests of the same call.
    """

    independent: bool

    def generate(self, requests: Sequence[Request], top_k: int = 0, temperature: float = 1.0) -> Iterator[Answer]:
        """Answers in any order, as they get ready, with the teacher's top-k if asked for."""
        ...


class HFEngine:
    """Greedy decoding with Transformers and continuous refill.

    Args:
        name: LLM (``offline:``, hub name or path).
        dtype: ``float32`` or ``bfloat16``.
        batch_size: rows decoded together.
        device: where to run; CUDA if there is one.

    Raises:
        ConfigError: an LLM with layers that are not attention.
    """

    independent = False

    def __init__(self, name: str, dtype: str = "bfloat16", batch_size: int = 128, device: str | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        path = resolve_pretrained(name)
        config = AutoConfig.from_pretrained(path).get_text_config()
        if other := set(getattr(config, "layer_types", None) or ()) - ATTENTION:
            raise ConfigError(
                f"engine=hf: {name} has layers that keep no keys and values ({', '.join(sorted(other))}). Use "
                "engine=vllm or engine=openai."
            )
        llm: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.llm = llm.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
        self.batch_size = batch_size
        self.stop_ids = set(stop_ids(AutoTokenizer.from_pretrained(path), self.llm.generation_config))

    def generate(self, requests: Sequence[Request], top_k: int = 0, temperature: float = 1.0) -> Iterator[Answer]:
        decoder = RefillDecoder(self.llm, self.stop_ids, self.batch_size, top_k=top_k, temperature=temperature)
        yield from decoder.run(requests)
