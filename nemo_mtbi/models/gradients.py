"""From accumulated gradients of sums to the gradient of a mean over the whole optimizer step."""

import hashlib
import logging
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from nemo_mtbi.config import ModelConfig
from nemo_mtbi.io.transfer import to_device
from nemo_mtbi.losses.vocabulary import VocabularyShard
from nemo_mtbi.parallel.parts import gradient_norm, reduce_gradients
from nemo_mtbi.parallel.ranks import rank_and_size, summed

log = logging.getLogger(__name__)


def seed_step(*parts: Any) -> None:
    """Seed PyTorch from what identifies a step."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))


def with_gradient(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Parameters of an optimizer that have a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def scale_gradients(parameters: list[torch.nn.Parameter], scale: Tensor, tensor_group: Any) -> Tensor:
    """Scale the gradients, complete them within a tensor-parallel group, and give their norm.

    Args:
        parameters: with gradients.
        scale: () factor.
        tensor_group: process group that holds the LLM together; None without one.
    """
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad *= scale.to(parameter.grad.dtype)
    if tensor_group is not None:
        reduce_gradients(parameters, tensor_group, torch.distributed.get_global_rank(tensor_group, 0))
    return gradient_norm(parameters, tensor_group)


class GradientMixin(LightningModule):
    """Lightning's hooks around an optimizer step, for :class:`nemo_mtbi.models.MTBISALM`."""

    config: ModelConfig
    vocabulary_shard: VocabularyShard
    seed: int
    stage: str
    bad_steps = 0
    _window_count: Tensor | None = None

    @property
    def oomptimizer_schema(self) -> dict[str, Any]:
        raise NotImplementedError(
            "Batches of MTBISALM hold planned examples, not tensors of a shape: `mtbi plan` prints the "
            "data.train_ds.batch_tokens for an LLM and a GPU; lower it where a step does not fit."
        )

    def data_parallel_group(self) -> Any:
        """Process group over which a step's response tokens (or answers) are counted (None: all ranks)."""
        return None if self.device_mesh is None else self.device_mesh["data_parallel"].get_group()

    def count_tokens(self, count: int) -> None:
        """Tokens that a micro-batch adds to the divisor of its optimizer step."""
        counted = to_device(float(count), self.device)
        self._window_count = counted if self._window_count is None else self._window_count + counted

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout depends on the step and the place of the batch in it alone.

        Not on the layout, nor on interruptions.
        """
        rank, ranks = rank_and_size(self.data_parallel_group())
        seed_step(
            self.seed, self.stage, self.global_step, batch_idx % self.trainer.accumulate_grad_batches * ranks + rank
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the accumulated gradients by the number of response tokens (or answers) over all data-parallel ranks.

        Lightning has divided each micro-batch by ``accumulate_grad_batches`` and DDP has averaged over ranks, so both
        are undone here. A step with a non-finite gradient is skipped and counted.
        """
        assert self._window_count is not None
        group = self.data_parallel_group()
        count, self._window_count = summed(self._window_count, group), None
        scale = self.trainer.accumulate_grad_batches * rank_and_size(group)[1] / count.clamp_min(1)
        parameters = with_gradient(optimizer)
        self._gradient_norm = norm = scale_gradients(parameters, scale, self.vocabulary_shard.group)
        self.log("gradient_norm", norm, on_step=True, batch_size=1)
        if torch.isfinite(norm):
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1.0:  # float16 steps back from its scale
            for parameter in parameters:
                parameter.grad = None
            return
        self.bad_steps += 1
        log.warning(f"Step {self.global_step} skipped: gradient norm is {norm} ({self.bad_steps} so far)")
        for parameter in parameters:
            parameter.grad = None
        if self.bad_steps > self.config.max_bad_steps:
            raise RuntimeError(
                f"{self.bad_steps} steps had a non-finite loss or gradient; max_bad_steps={self.config.max_bad_steps}. "
                "Lower the learning rate, or look at the examples of the last steps."
            )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that :meth:`on_before_optimizer_step` has computed; it counts what is spread over ranks."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        torch.nn.utils.clip_grads_with_norm_(with_gradient(optimizer), gradient_clip_val, self._gradient_norm)
