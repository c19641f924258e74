"""Hidden states of student and teacher at the positions that predict the response; no logits.

Letters: B examples, L positions, P columns of kept prompt beginnings, R response tokens, H LLM width.
"""

import logging
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.transfer import to_device
from nemo_mtbi.models.packing import Prefix, packable, packed_states
from nemo_mtbi.modules.causal_lm import causal_lm, without_adapters
from nemo_mtbi.modules.connectors.base import computed_dtype, evaluation_mode

log = logging.getLogger(__name__)

PACKED_BELOW = 0.92  # share of valid positions above which padded rows are as fast (benchmarks/results/packing.json)
PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # of states, relative


def hidden_states(
    llm: nn.Module, inputs_embeds: Tensor, prefix: Prefix | None = None, lengths: list[int] | None = None
) -> Tensor:
    """Last hidden states (B, L, H) of right-padded embeddings (B, L, H), after an optional prefix.

    No mask is passed without a prefix: under causal attention, padding on the right never reaches a valid position, and
    the attention kernels then take their fastest path.

    Args:
        lengths: valid positions of each row, to compute those alone (:mod:`nemo_mtbi.models.packing`).
    """
    model = causal_lm(llm).model
    if lengths is not None and sum(lengths) < PACKED_BELOW * inputs_embeds.shape[:2].numel():
        return packed_states(model, inputs_embeds, lengths, prefix)
    if prefix is None:
        return model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
    width = inputs_embeds.shape[1]
    columns = prefix.layers[0][0].shape[2]
    position = torch.arange(columns + width, device=inputs_embeds.device)
    mask = (position >= columns - prefix.lengths[:, None]).long()
    return model(
        inputs_embeds=inputs_embeds,
        attention_mask=mask,
        position_ids=prefix.lengths[:, None] + position[:width],
        past_key_values=DynamicCache(prefix.layers),
        use_cache=True,
    ).last_hidden_state


@torch.no_grad()
def packs(llm: nn.Module, embed_tokens: nn.Module) -> bool:
    """Whether packed rows give what padded ones give, tried on two short rows with kept beginnings and without.

    An LLM may rearrange its keys, or keep arguments for itself; with tensor parallelism all ranks ask together.
    """
    lm = causal_lm(llm)
    if not packable(lm):
        return False
    lengths, device = [3, 1], next(embed_tokens.parameters()).device
    inputs = embed_tokens(to_device([[7, 8, 9], [10, 0, 0]], device))
    valid = to_device([[True] * 3, [True, False, False]], device)
    computed = computed_dtype(device, inputs.dtype)
    tolerance = max(PACKING_TOLERANCE.get(dtype, 1e-3) for dtype in (inputs.dtype, computed))
    with evaluation_mode(llm):
        try:
            for prefix in (None, PrefixStore(8).get(llm, embed_tokens, [[5, 6], [4]])):
                expected = hidden_states(llm, inputs, prefix)[valid].float()
                got = hidden_states(llm, inputs, prefix, lengths)[valid].float()
                error = float((got - expected).norm() / expected.norm())
                if not error <= tolerance:
                    log.info(f"{type(lm).__name__} computes padded rows: packed ones differ by {error:.2g}")
                    return False
        except (ConfigError, TypeError, ValueError, RuntimeError) as error:
            log.info(f"{type(lm).__name__} computes padded rows: {error}")
            return False
    return True


class PrefixStore:
    """Keys and values of prompt beginnings (system turn and task prompt), computed once and kept.

    They come before the first speech position, so they depend on nothing that is trained: neither their forward nor
    their backward pass is repeated. Valid only while the LLM itself is frozen.

    Args:
        max_tokens: tokens kept; the least recently used beginnings go first.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        # of each beginning of P tokens, keys and values of all N layers in turn: (2 N, heads, P, d)
        self.kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self.place: tuple[torch.device, torch.dtype] | None = None

    def clear(self) -> None:
        self.kept.clear()

    @torch.no_grad()
    def get(self, llm: nn.Module, embed_tokens: nn.Module, prefixes: list[list[int]]) -> Prefix | None:
        """The prefix of every row; None where no row has one.

        Raises:
            ConfigError: an LLM whose layers differ in size.
        """
        columns = max(map(len, prefixes))
        if columns == 0:
            return None
        weight = next(embed_tokens.parameters())
        if (where := (weight.device, weight.dtype)) != self.place:  # the model has moved
            self.clear()
            self.place = where
        rows = [tuple(p) for p in prefixes]
        have = {r: self.kept.pop(r) for r in dict.fromkeys(rows) if r in self.kept}
        missing = [r for r in dict.fromkeys(rows) if r not in have]
        if missing:
            ids = pad_right([list(r) for r in missing], weight.device)
            cache = DynamicCache()
            causal_lm(llm).model(inputs_embeds=embed_tokens(ids), past_key_values=cache, use_cache=True)
            states = [state for layer in cast(list[Any], cache.layers) for state in (layer.keys, layer.values)]
            if len({state.shape for state in states}) > 1:
                raise ConfigError(
                    "The LLM's layers have keys and values of different sizes, so that its prompt beginnings cannot be "
                    "kept. Set model.prefix_cache_tokens=0."
                )
            joint = torch.stack(states)
            for index, row in enumerate(missing):
                have[row] = joint[:, index, :, : len(row)].clone()
        self.kept.update(have)
        tokens = sum(map(len, self.kept))
        while tokens > self.max_tokens and len(self.kept) > 1:
            tokens -= len(self.kept.popitem(last=False)[0])
        # A few kernels, whatever the number of layers and rows: the batch's different beginnings, then one selection.
        place = {row: index for index, row in enumerate(have)}
        different = torch.stack([_pad_columns(kept, columns) for kept in have.values()], 1)
        chosen = to_device([[place[row], len(row)] for row in rows], different.device)
        batch = different.index_select(1, chosen[:, 0])
        return Prefix(list(zip(batch[::2], batch[1::2], strict=True)), chosen[:, 1], [len(row) for row in rows])


def _pad_columns(tensor: Tensor, columns: int) -> Tensor:
    """(..., P, d) -> (..., columns, d), padded on the left."""
    return nn.functional.pad(tensor, (0, 0, columns - tensor.shape[-2], 0))


def pad_right(sequences: list[list[int]], device: torch.device) -> Tensor:
    """Token lists -> ids (B, L) padded with 0 on the right."""
    width = max(map(len, sequences))
    return to_device([sequence + [0] * (width - len(sequence)) for sequence in sequences], device)


@torch.no_grad()
def teacher_hidden_states(
    llm: nn.Module,
    embed_tokens: nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    store: PrefixStore | None = None,
    prefix_lengths: list[int] | None = None,
    packed: bool = False,
) -> Tensor:
    """The text LLM's hidden states (R, H) at the positions before each response token; no gradient, no logits.

    Args:
        prompts: token ids with the transcript in place of speech.
        responses: the teacher's answers; the last token is never an input.
        store, prefix_lengths: where each prompt's constant beginning is kept, and its length.
        packed: without padding, so that groups need not be of very similar length.
    """
    device = next(embed_tokens.parameters()).device
    skip = prefix_lengths if store is not None and prefix_lengths is not None else [0] * len(prompts)
    rest = [p[n:] + r[:-1] for p, r, n in zip(prompts, responses, skip, strict=True)]
    parts: dict[int, Tensor] = {}
    lengths = [len(tokens) for tokens in rest]
    for group in length_groups(lengths, 0.5) if packed else length_groups(lengths):  # attention alone is padded
        ids = pad_right([rest[i] for i in group], device)
        with without_adapters(llm):
            prefix = None
            if store is not None:
                prefix = store.get(llm, embed_tokens, [prompts[i][: skip[i]] for i in group])
            hidden = hidden_states(llm, embed_tokens(ids), prefix, [lengths[i] for i in group] if packed else None)
        for row, i in enumerate(group):
            parts[i] = hidden[row, len(rest[i]) - len(responses[i]) : len(rest[i])]
    return torch.cat([parts[i] for i in range(len(rest))])


def length_groups(lengths: list[int], waste: float = 0.05, smallest: int = 4) -> list[list[int]]:
    """Split rows into groups of similar length, so that padding stays below ``waste`` of a group's positions.

    Rows go from long to short; a group is closed when the next row would bring its padding over the limit and it has at
    least ``smallest`` rows.
    """
    groups: list[list[int]] = []
    valid = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = groups[-1] if groups else []
        longest = lengths[group[0]] if group else 0
        if group and (len(group) < smallest or valid + lengths[index] >= (1 - waste) * longest * (len(group) + 1)):
            group.append(index)
            valid += lengths[index]
        else:
            groups.append([index])
            valid = lengths[index]
    return groups
