"""Megatron-Core's layers with the signatures of the PyTorch layers that they replace."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from nemo_mtbi.losses.vocabulary import VocabularyShard


class ColumnLinear(ColumnParallelLinear):
    """``ColumnParallelLinear`` that returns the output alone, as ``nn.Linear`` does.

    (..., in) -> (..., out / ranks).
    """

    def forward(self, input_: Tensor) -> Tensor:
        return super().forward(input_)[0]


class RowLinear(RowParallelLinear):
    """``RowParallelLinear`` that returns the output alone. (..., in / ranks) -> (..., out), summed over the ranks, or
    this rank's summand where ``summed`` is false."""

    summed = True

    def forward(self, input_: Tensor) -> Tensor:
        if self.summed:
            return super().forward(input_)[0]
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return nn.functional.linear(input_, self.weight, self.bias if first else None)


class ScaledVocabParallelEmbedding(VocabParallelEmbedding):
    """Token embedding whose rows are spread over the ranks; ``scale`` is Gemma's factor on the output."""

    def __init__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, input_: Tensor) -> Tensor:
        output = super().forward(input_)
        return output if self.scale == 1.0 else output * self.scale


class VocabularyHead(nn.Module):
    """This rank's rows of ``lm_head``.

    Called as a layer (generation), it gathers the logits of the whole vocabulary.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, vocabulary: int, shard: VocabularyShard
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.vocabulary, self.shard = weight, bias, vocabulary, shard

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., H) -> logits (..., V), without a gradient."""
        local = nn.functional.linear(hidden, self.weight, self.bias).detach().contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(self.shard.group))]
        dist.all_gather(parts, local, group=self.shard.group)
        return torch.cat(parts, -1)[..., : self.vocabulary]
