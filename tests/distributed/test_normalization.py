"""Two real processes over gloo through Lightning's DDP: the gradient equals one process's on the same examples."""

import os

import lightning.pytorch as pl
import pytest
import torch

from nemo_mtbi.models import MTBISALM
from tests.helpers import make_batch
from tests.launching import on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.parity]


class Batches(torch.utils.data.Dataset):
    """Rank r of n gets every n-th example, so ranks hold different numbers of response tokens."""

    def __init__(self, model, ranks, rank):
        batch = make_batch(model, 6)
        keep = list(range(rank, 6, ranks))
        self.batch = {
            "examples": [batch["examples"][i] for i in keep],
            "audios": batch["audios"][keep],
            "audio_lens": batch["audio_lens"][keep],
        }

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.batch


def step(rank, config, ranks, results):
    """One optimizer step of MTBISALM under Lightning; the parameters after it."""
    torch.set_num_threads(1)
    if ranks > 1:  # as Lightning's own launcher starts its ranks
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    torch.manual_seed(0)
    model = MTBISALM(config)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        strategy="ddp" if ranks > 1 else "auto",
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(Batches(model, ranks, trainer.global_rank), batch_size=None)

    trainer.fit(model, Data())
    assert trainer.world_size == ranks
    results[rank] = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_two_processes_give_the_gradient_of_one(tiny_config):
    one, two = (on_ranks(ranks, step, tiny_config, ranks)[0] for ranks in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert float((two[name] - value).norm()) <= 1e-4 * float(value.norm()), name
