"""Answers from an OpenAI-compatible server, through the official client's ``/v1/completions``.

The prompt is rendered here, as in training, and sent as text (or token ids); a chat endpoint would apply its own
template.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.targets.config import OpenAIConfig
from nemo_mtbi.targets.decoder import Answer, Request

log = logging.getLogger(__name__)
# A server takes what is not sent from the LLM's generation_config.json, and some of those have a repetition penalty,
# which counts the transcript too: "repeat" would not. vLLM knows it by this name; `transformers serve` refuses the
# name, and takes the frequency penalty for it.
PENALTY = "repetition_penalty"
PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds, as the client's own between its retries
SAID = 500  # letters of an error that are shown
ENDS = {"stop": True, "length": False, "content_filter": False}  # finish_reason of a completion, and whether it ended


class OpenAIEngine:
    """Greedy completions with retries, back-off, a rate limit and time-outs.

    Args:
        config: the server.
        tokenizer: of the LLM that the server runs.
        end_of_turn: the token that ends an answer, which the server leaves out of its text.

    Raises:
        ConfigError: the ``openai`` package is missing.
    """

    independent = True

    def __init__(self, config: OpenAIConfig, tokenizer: PreTrainedTokenizerBase, end_of_turn: int) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError("engine=openai needs the client: pip install 'nemo-mtbi[targets]'.") from error
        assert config.model is not None
        self.config, self.model, self.tokenizer, self.errors = config, config.model, tokenizer, openai
        self.client = openai.OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get(config.api_key_variable) or "none",
            max_retries=config.max_retries,
            timeout=config.timeout_seconds,
        )
        self.end_of_turn = end_of_turn
        self.extra: dict[str, Any] = {PENALTY: 1.0}
        self._next_start = 0.0
        self._lock = threading.Lock()

    def generate(self, requests: Sequence[Request], top_k: int = 0, temperature: float = 1.0) -> Iterator[Answer]:
        """Answers as they come.

        Raises:
            ConfigError: a top-k is asked for, the key or the model's name is wrong, or the server counts other tokens.
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
        """
        Raises:
            ConfigError, DataError: see :meth:`generate`.
        """
        where, ends = f"{self.config.base_url} (model {self.model})", list[str]()
        while len(ends) <= self.config.max_retries:
            if ends:
                time.sleep(min(PAUSE * 2 ** (len(ends) - 1), LONGEST_PAUSE))
            try:
                reply = self._completion(request)
            except json.JSONDecodeError as error:
                reply = f"{type(error).__name__}: {error}"
            if not getattr(reply, "choices", None):  # an error of a gateway, with status 200
                ends.append(f"no completion, {str(reply)[:SAID]!r}")
                continue
            read = getattr(getattr(reply, "usage", None), "prompt_tokens", None)
            if read is not None and read != len(request.prompt_ids):
                raise ConfigError(
                    f"{where} read {read} tokens where the prompt has {len(request.prompt_ids)}: it runs another LLM "
                    "than llm names, or adds tokens of its own. Serve that LLM, or set openai.send_token_ids=true."
                )
            choice = reply.choices[0]
            if choice.finish_reason in ENDS:
                return self._read(request, choice.text or "", ENDS[choice.finish_reason])
            ends.append(str(choice.finish_reason))  # the server gave it up
        raise DataError(
            f"{where} gives up answers ({', '.join(ends)}). Check openai.base_url, and the server's log; the same "
            "command continues."
        )

    def _read(self, request: Request, text: str, finished: bool) -> Answer:
        try:
            ids, _ = literal_encoding(self.tokenizer, text)
        except DataError:  # letters that this tokenizer cannot write: no answer to train on
            return Answer(request.key, [], False)
        return Answer(request.key, ids + [self.end_of_turn] * finished, finished)

    def _completion(self, request: Request) -> Any:
        self._wait_for_turn()
        e, where, extra = self.errors, f"{self.config.base_url} (model {self.model})", self.extra
        try:
            reply = self.client.completions.create(
                model=self.model,
                prompt=request.prompt_ids if self.config.send_token_ids else self._text(request.prompt_ids),
                max_tokens=request.max_new_tokens,
                temperature=0.0,
                frequency_penalty=0.0,
                extra_body=extra,
            )
        except (e.AuthenticationError, e.PermissionDeniedError) as error:
            raise ConfigError(
                f"{where} refuses the key in ${self.config.api_key_variable}: {said(error)}. Set that variable."
            ) from error
        except e.NotFoundError as error:
            raise ConfigError(
                f"{where}: {said(error)}. Check openai.model and openai.base_url (it ends in /v1)."
            ) from error
        except (e.BadRequestError, e.UnprocessableEntityError) as error:
            if PENALTY in extra and PENALTY in words_of(error):
                if self.extra:
                    log.warning("%s takes no %s: that of the LLM's generation_config.json holds.", where, PENALTY)
                self.extra = {}
                return self._completion(request)
            raise ConfigError(
                f"{where} refuses a prompt of {len(request.prompt_ids)} tokens with {request.max_new_tokens} new ones: "
                f"{said(error)}. If it is too long, set openai.context_tokens; such prompts are then rejected "
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
                f"{said(error)}. "
                "Lower openai.concurrency or set openai.requests_per_minute; the same command continues."
            ) from error
        except e.OpenAIError as error:
            raise DataError(
                f"{where} sent something that is no completion ({error}). Check openai.base_url."
            ) from error
        return reply

    def _text(self, ids: list[int]) -> str | list[int]:
        """The prompt as text that the server's tokenizer, which adds its special tokens, turns back into ``ids``; the
        ids where no text does (a transcript holds the letters of a control token).
        """
        for begin in (0, 1):  # a server adds the first token itself where the tokenizer has one
            text = str(
                self.tokenizer.decode(ids[begin:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
            if self.tokenizer(text)["input_ids"] == ids:
                return text
        return ids

    def _wait_for_turn(self) -> None:
        if self.config.requests_per_minute is None:
            return
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + 60.0 / self.config.requests_per_minute
        time.sleep(max(0.0, start - time.monotonic()))


def said(error: Any) -> str:
    """The beginning of :func:`words_of`."""
    return words_of(error)[:SAID]


def words_of(error: Any) -> str:
    """A server's words: the client leaves out all that is not called ``message`` (FastAPI's ``detail``)."""
    body = getattr(error, "body", None)
    if not body or (isinstance(body, dict) and isinstance(body.get("message"), str)):
        return str(error)
    return f"{error}: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}"
