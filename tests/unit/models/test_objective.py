"""What is summed into the loss."""

import copy

import pytest
import torch

from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.objective import sums_by_task
from tests.helpers import make_batch

pytestmark = pytest.mark.unit


def test_sums_by_task_add_up(tiny_config):
    model = MTBISALM(copy.deepcopy(tiny_config)).eval()
    batch = make_batch(model, 4)
    student = model.student(batch, interleave=False)
    loss = model.imitation(batch, student)
    sums = torch.stack(list(sums_by_task(batch["examples"], student.layout, loss).values())).sum(0)
    assert sums.tolist() == pytest.approx([float(loss.loss), float(loss.agreed.sum()), len(loss.agreed)], rel=1e-4)
