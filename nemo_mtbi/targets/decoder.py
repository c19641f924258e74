"""Greedy decoding with continuous refill: a finished row makes place for the next prompt at once.

A fixed batch runs until its longest answer ends, and most of its rows idle meanwhile. Here the rows of one cache are
right-aligned to a common column; a new prompt's keys and values are computed in a small batch of their own and put into
the columns that end there. Keys carry their rotary position already, so a row's columns may stand anywhere.

Letters: B rows, T cache columns, P prompt columns, V vocabulary, K kept teacher entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nemo_mtbi.modules.causal_lm import output_head


@dataclass(frozen=True)
class Request:
    """One prompt to answer: its content key, rendered token ids and token budget."""

    key: str
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass
class Answer:
    """Generated tokens, end-of-turn included if ``finished``, and the teacher's top-k (N, K) at each of them."""

    key: str
    response_ids: list[int]
    finished: bool
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None


@dataclass
class _Row:
    request: Request
    tokens: list[int] = field(default_factory=list)
    top_ids: list[Tensor] = field(default_factory=list)
    top_log_probs: list[Tensor] = field(default_factory=list)
    done: bool = False


class RefillDecoder:
    """Greedy decoding of many requests.

    Args:
        llm: a Transformers causal LM with a ``DynamicCache`` of keys and values.
        stop_ids: tokens that end an answer.
        batch_size: B, rows decoded together.
        refill_share: share of the rows that must be free before new prompts are brought in.
        top_k, temperature: teacher entries kept at each token (0: none), and the temperature of their
            log-probabilities.
    """

    def __init__(
        self,
        llm: Any,
        stop_ids: set[int],
        batch_size: int,
        refill_share: float = 0.25,
        top_k: int = 0,
        temperature: float = 1.0,
    ) -> None:
        self.llm, self.stop_ids, self.batch_size = llm, stop_ids, batch_size
        self.refill_rows = max(1, round(refill_share * batch_size))
        self.top_k, self.temperature = top_k, temperature
        self.device = next(llm.parameters()).device
        self.head = output_head(llm)

    @torch.no_grad()
    def run(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Answers as they get ready. Prompts of similar length are brought in together."""
        waiting = sorted(requests, key=lambda r: len(r.prompt_ids))
        rows: list[_Row] = []
        cache: list[tuple[Tensor, Tensor]] = []
        mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        while rows or waiting:
            active = [i for i, row in enumerate(rows) if not row.done]
            free = self.batch_size - len(active)
            if (waiting and free >= min(self.refill_rows, len(waiting))) or len(active) <= len(rows) // 2:
                new = [_Row(waiting.pop()) for _ in range(min(free, len(waiting)))]
                rows, cache, mask = self._exchange([rows[i] for i in active], active, cache, mask, new)
                yield from (self._answer(r) for r in rows if r.done)
                continue
            cache, mask = self._step(rows, cache, mask)
            yield from (self._answer(rows[i]) for i in active if rows[i].done)

    def _exchange(
        self, kept: list[_Row], active: list[int], cache: list[tuple[Tensor, Tensor]], mask: Tensor, new: list[_Row]
    ) -> tuple[list[_Row], list[tuple[Tensor, Tensor]], Tensor]:
        """Drop finished rows, trim columns that no row uses, and append new prompts."""
        index = torch.tensor(active, dtype=torch.long, device=self.device)
        mask = mask[index]
        first = int(mask.any(0).long().argmax()) if len(kept) else mask.shape[1]
        mask = mask[:, first:]
        cache = [(k[index, :, first:], v[index, :, first:]) for k, v in cache]
        if not new:
            return kept, cache, mask
        new_cache, new_mask = self._prefill(new)
        if not kept:
            return new, new_cache, new_mask
        width = max(mask.shape[1], new_mask.shape[1])
        merged = [
            (
                torch.cat([_left_pad(k, width), _left_pad(nk, width)]),
                torch.cat([_left_pad(v, width), _left_pad(nv, width)]),
            )
            for (k, v), (nk, nv) in zip(cache, new_cache, strict=True)
        ]
        masks = [nn.functional.pad(m, (width - m.shape[1], 0)) for m in (mask, new_mask)]
        return kept + new, merged, torch.cat(masks)

    def _prefill(self, rows: list[_Row]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        width = max(len(r.request.prompt_ids) for r in rows)
        ids = torch.tensor([[0] * (width - len(r.request.prompt_ids)) + r.request.prompt_ids for r in rows])
        mask = torch.tensor([[0] * (width - len(r.request.prompt_ids)) + [1] * len(r.request.prompt_ids) for r in rows])
        return self._forward(rows, ids.to(self.device), mask.to(self.device), [])

    def _step(
        self, rows: list[_Row], cache: list[tuple[Tensor, Tensor]], mask: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        ids = torch.tensor([[r.tokens[-1]] for r in rows], device=self.device)
        return self._forward(rows, ids, nn.functional.pad(mask, (0, 1), value=1), cache)

    def _forward(
        self, rows: list[_Row], ids: Tensor, mask: Tensor, cache: list[tuple[Tensor, Tensor]]
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """One forward pass of ids (B, L); each unfinished row gets its next token."""
        past = DynamicCache(cache) if cache else DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = self.llm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
        )
        logits = self.head.logits(out.last_hidden_state[:, -1])
        best = logits.argmax(-1).tolist()
        if self.top_k:
            scaled = logits / self.temperature
            top, keep = scaled.topk(min(self.top_k, scaled.shape[-1]), -1)
            log_probs, keep = (top - scaled.logsumexp(-1, keepdim=True)).half().cpu(), keep.int().cpu()
        for index, row in enumerate(rows):
            if row.done:
                continue
            row.tokens.append(best[index])
            if self.top_k:
                row.top_ids.append(keep[index])
                row.top_log_probs.append(log_probs[index])
            row.done = best[index] in self.stop_ids or len(row.tokens) >= row.request.max_new_tokens
        return [(layer.keys, layer.values) for layer in cast(list[Any], past.layers)], mask

    def _answer(self, row: _Row) -> Answer:
        finished = row.tokens[-1] in self.stop_ids
        if not self.top_k:
            return Answer(row.request.key, row.tokens, finished)
        return Answer(row.request.key, row.tokens, finished, torch.stack(row.top_ids), torch.stack(row.top_log_probs))


def _left_pad(tensor: Tensor, width: int) -> Tensor:
    """(B, heads, T, d) -> (B, heads, width, d)."""
    return nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
