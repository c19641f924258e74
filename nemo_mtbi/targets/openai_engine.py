"""Answers from an OpenAI-compatible server, through the official client's ``/v1/completions``.

The prompt is rendered here, as in training, and sent as text (or token ids); a chat endpoint would apply its own
template.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from transformers import GenerationConfig, PreTrainedTokenizerBase

from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.modules.causal_lm import stop_ids
from nemo_mtbi.targets.config import OpenAIConfig
from nemo_mtbi.targets.decoder import Answer, Request


class OpenAIEngine:
    """Greedy completions with retries, back-off, a rate limit and time-outs.

    Args:
        config: the server.
        tokenizer: of the LLM that the server runs.
        llm: path of that LLM here; its generation configuration says which tokens end a turn.

    Raises:
        ConfigError: the ``openai`` package is missing.
    """

    independent = True

    def __init__(self, config: OpenAIConfig, tokenizer: PreTrainedTokenizerBase, llm: str) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError("engine=openai needs the client: pip install 'nemo-mtbi[targets]'.") from error
        assert config.model is not None
        self.config, self.model, self.tokenizer, self.errors = config, config.model, tokenizer, openai
        self.client = openai.OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get(config.api_key_variable, "none"),
            max_retries=config.max_retries,
            timeout=config.timeout_seconds,
        )
        try:
            generation_config = GenerationConfig.from_pretrained(llm)
        except OSError:
            generation_config = None
        self.stop_ids = stop_ids(tokenizer, generation_config)
        self._next_start = 0.0
        self._lock = threading.Lock()

    def generate(self, requests: Sequence[Request], top_k: int = 0, temperature: float = 1.0) -> Iterator[Answer]:
        """Answers as they come.

        Raises:
            ConfigError: a top-k is asked for, the key or the model's name is wrong, or the tokenizers differ.
            DataError: the server cannot be reached or fails again after all retries.
        """
        if top_k:
            raise ConfigError(
                f"top_k={top_k}: the completions API gives no log-probabilities by token id. "
                "Use engine=hf for a cached teacher, or top_k=0 and model.imitation.teacher=online."
            )
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            waiting = [pool.submit(self._answer, r) for r in requests]
            try:
                for done in as_completed(waiting):
                    yield done.result()
            finally:
                for future in waiting:
                    future.cancel()

    def _answer(self, request: Request) -> Answer:
        self._wait_for_turn()
        e = self.errors
        where = f"{self.config.base_url} (model {self.model})"
        try:
            reply = self.client.completions.create(
                model=self.model,
                prompt=request.prompt_ids if self.config.send_token_ids else self._text(request.prompt_ids),
                max_tokens=request.max_new_tokens,
                temperature=0.0,
            )
        except (e.AuthenticationError, e.PermissionDeniedError) as error:
            raise ConfigError(
                f"{where} refuses the key in ${self.config.api_key_variable}: {error}. Set that variable."
            ) from error
        except e.NotFoundError as error:
            raise ConfigError(f"{where}: {error}. Check openai.model and openai.base_url (it ends in /v1).") from error
        except e.BadRequestError as error:
            raise ConfigError(
                f"{where} refuses a prompt of {len(request.prompt_ids)} tokens with {request.max_new_tokens} new ones: "
                f"{error.message}. If it is too long, set openai.context_tokens; such prompts are then rejected "
                f"and counted."
            ) from error
        except e.APITimeoutError as error:
            raise DataError(
                f"{where} did not answer within {self.config.timeout_seconds} s, {self.config.max_retries} "
                f"retries included. "
                "Raise openai.timeout_seconds or lower openai.concurrency; the same command continues."
            ) from error
        except e.APIConnectionError as error:
            raise DataError(
                f"Cannot reach {where}: {error}. Is the server running? The same command continues where this one "
                f"stopped."
            ) from error
        except e.APIStatusError as error:
            raise DataError(
                f"{where} still fails after {self.config.max_retries} retries: HTTP {error.status_code}, "
                f"{error.message}. "
                "Lower openai.concurrency or set openai.requests_per_minute; the same command continues."
            ) from error
        except e.OpenAIError as error:
            raise DataError(
                f"{where} sent something that is no completion ({error}). Check openai.base_url."
            ) from error
        if not getattr(reply, "choices", None):
            raise DataError(f"{where} sent no completion ({str(reply)[:200]!r}). Check openai.base_url.")
        choice = reply.choices[0]
        ids = self.tokenizer(choice.text, add_special_tokens=False)["input_ids"]
        finished = choice.finish_reason == "stop"
        return Answer(request.key, ids + [self._end_of_turn(request)] * finished, finished)

    def _text(self, ids: list[int]) -> str:
        """The prompt as text that the server's tokenizer, which adds its special tokens, turns back into ``ids``."""
        for begin in (0, 1):  # a server adds the first token itself where the tokenizer has one
            text = str(
                self.tokenizer.decode(ids[begin:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
            if self.tokenizer(text)["input_ids"] == ids:
                return text
        raise ConfigError(
            "The prompt's tokens do not survive being sent as text with this tokenizer. Use openai.send_token_ids=true."
        )

    def _end_of_turn(self, request: Request) -> int:
        """The stop token that ends the user's turn in the prompt, too; else the LLM's first one."""
        return next((i for i in reversed(request.prompt_ids) if i in self.stop_ids), self.stop_ids[0])

    def _wait_for_turn(self) -> None:
        if self.config.requests_per_minute is None:
            return
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + 60.0 / self.config.requests_per_minute
        time.sleep(max(0.0, start - time.monotonic()))
