"""The LLM on the valid positions of a micro-batch alone: one row without padding.

All layers but attention work on each position for itself, and see N positions instead of B L. Attention is
block-diagonal and causal: of each example over its own positions, after its kept prompt beginning if there is one.
Transformers hands further arguments of a model through to its attention function, so a :class:`Packing` travels there:

- ``sdpa``: queries, keys and values go back to padded rows for this one operation, whose kernels then need no mask.
- ``flash_attention_2`` and later: the kernels' own form, cumulative lengths of queries and keys.

Letters: B examples, L positions of the longest, N valid positions, P columns of kept prompt beginnings, h heads, d head
width, H LLM width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.transfer import all_to_device

SDPA, FLASH = "sdpa", ("flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class Prefix:
    """Keys and values of each row's constant beginning, left-padded to P columns.

    Attributes:
        layers: for each layer, keys and values (B, h, P, d).
        lengths: (B,) valid columns.
        counts: the same numbers on the host.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    counts: list[int]


@dataclass(frozen=True)
class Packing:
    """Where the valid positions of B right-padded rows are, and what their attention needs.

    Attributes:
        places: (N,) each of them in the flattened (B L).
        rows: (B, L) and back; padding points at the row's last valid position.
        positions: (N,) of each, after the row's prompt beginning.
        prefix: keys and values before each row.
        mask: (B, 1, L, P + L) for ``sdpa`` with a prefix; else its kernels need none.
        keys: (K,) for flash with a prefix: each row's keys in turn, in ``cat([prefix (B P), own (N)])``.
        begins: for flash, Transformers' names of the cumulative lengths (B + 1,) and the longest.
        calls: attention layers that have used this.
    """

    places: Tensor
    rows: Tensor
    positions: Tensor
    prefix: Prefix | None = None
    mask: Tensor | None = None
    keys: Tensor | None = None
    begins: dict[str, Any] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)

    @classmethod
    def plan(
        cls, lengths: list[int], device: torch.device | str = "cpu", prefix: Prefix | None = None, flash: bool = False
    ) -> "Packing":
        """Of rows of these lengths, each at least 1, padded to the longest; made on the host, sent at once."""
        own, before = torch.tensor(lengths), torch.tensor(prefix.counts if prefix else [0] * len(lengths))
        column = torch.arange(max(lengths))
        valid = column < own[:, None]
        begins = cumulative(own)
        rows = begins[:-1, None] + column.minimum(own[:, None] - 1)
        tensors = [valid.flatten().nonzero()[:, 0], rows, (column + before[:, None])[valid]]
        columns = prefix.layers[0][0].shape[2] if prefix else 0
        if flash:
            tensors += [begins, cumulative(own + before), prefix_and_own(before.tolist(), columns, lengths)]
        places, rows, positions, *more = all_to_device(tensors, torch.device(device))
        if flash:
            lengths_of: dict[str, Any] = {"cu_seq_lens_q": more[0].int(), "cu_seq_lens_k": more[1].int()}
            lengths_of |= {"max_length_q": max(lengths), "max_length_k": int((own + before).max())}
            return cls(places, rows, positions, prefix, None, more[2] if prefix else None, lengths_of)
        if prefix is None:
            return cls(places, rows, positions)
        key = torch.arange(columns + len(column), device=places.device)
        after = key >= columns - prefix.lengths[:, None]
        return cls(places, rows, positions, prefix, after[:, None, None] & (key <= key[columns:, None]))

    def packed(self, padded: Tensor) -> Tensor:
        """(B, L, ...) -> (1, N, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places)[None]

    def padded(self, packed: Tensor) -> Tensor:
        """(1, N, ...) -> (B, L, ...); what stands at padding means nothing."""
        return packed[0].index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)


def cumulative(lengths: Tensor) -> Tensor:
    """(B,) -> (B + 1,) where each begins, and the end."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def prefix_and_own(prefixes: list[int], columns: int, lengths: list[int]) -> Tensor:
    """Each row's keys in turn, its prompt beginning first: places in ``cat([prefix (B P), own (N)])``."""
    own, parts = len(lengths) * columns, []
    for row, (before, length) in enumerate(zip(prefixes, lengths, strict=True)):
        parts += [torch.arange(before) + (row + 1) * columns - before, torch.arange(length) + own]
        own += length
    return torch.cat(parts)


def packable(llm: Any) -> bool:
    """Whether a Transformers causal LM says that every layer is full attention, by a function that knows packing."""
    config = llm.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        narrow = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    else:
        narrow = any(kind != "full_attention" for kind in kinds)
    return not narrow and config._attn_implementation in (SDPA, *FLASH)


def packed_states(body: Any, inputs: Tensor, lengths: list[int], prefix: Prefix | None = None) -> Tensor:
    """Last hidden states (B, L, H) of right-padded embeddings (B, L, H); at padding they mean nothing.

    Args:
        body: Transformers' model without output layer, :func:`packable`.
        inputs: embeddings; after ``prefix``, if there is one.
        lengths: valid positions of each row.

    Raises:
        ConfigError: the model does not hand further arguments to its attention.
    """
    implementation = body.config.get_text_config()._attn_implementation
    know_packing(implementation)
    packing = Packing.plan(lengths, inputs.device, prefix, flash=implementation in FLASH)
    hidden = body(
        inputs_embeds=packing.packed(inputs),
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.device),  # four dimensions: no other mask
        position_ids=packing.positions[None],
        use_cache=False,
        packing=packing,
    ).last_hidden_state
    if sorted(packing.calls) != list(range(len(body.layers))):
        raise ConfigError(
            f"{type(body).__name__} does not attend once in each layer with the arguments given to it. "
            "Set model.packing=false."
        )
    return packing.padded(hidden)


def know_packing(implementation: str) -> None:
    """Let Transformers' attention function of this name know packing; without a plan it does what it did."""
    known = ALL_ATTENTION_FUNCTIONS[implementation]
    if getattr(known, "knows_packing", False):
        return
    attend = _flash if implementation in FLASH else _sdpa

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packing is None:
            return known(module, query, key, value, attention_mask, **kwargs)
        packing.calls.append(module.layer_idx)
        return attend(known, module, (query, key, value), packing, kwargs), None

    attention.knows_packing = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register(implementation, attention)


def _sdpa(known: Any, module: Any, states: tuple[Tensor, ...], packing: Packing, kwargs: dict[str, Any]) -> Tensor:
    """(1, h, N, d) each -> (1, N, h, d)."""
    query, key, value = (packing.padded(state.transpose(1, 2)).transpose(1, 2) for state in states)
    if packing.prefix is not None:
        keys, values = packing.prefix.layers[module.layer_idx]
        key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return packing.packed(known(module, query, key, value, packing.mask, **kwargs)[0])


def _flash(known: Any, module: Any, states: tuple[Tensor, ...], packing: Packing, kwargs: dict[str, Any]) -> Tensor:
    """(1, h, N, d) each -> (1, N, h, d)."""
    query, key, value = states
    if packing.prefix is not None:
        assert packing.keys is not None
        before = packing.prefix.layers[module.layer_idx]
        key, value = (
            torch.cat([kept.transpose(0, 1).flatten(1, 2), own[0]], 1).index_select(1, packing.keys)[None]
            for kept, own in zip(before, (key, value), strict=True)
        )
    return known(module, query, key, value, None, **kwargs, **packing.begins)[0]
