"""Two real processes over gloo through Lightning's DDP: the gradient equals one process's on the same examples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.parity]
SCRIPT = Path(__file__).with_name("ddp_step.py")


def run(config, ranks, tmp_path):
    out = tmp_path / f"{ranks}.pt"
    environment = {**os.environ, "MASTER_PORT": "29513", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), json.dumps(config), str(ranks), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_two_processes_give_the_gradient_of_one(tiny_config, tmp_path):
    import torch

    one, two = (torch.load(run(tiny_config, r, tmp_path), weights_only=True) for r in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert float((two[name] - value).norm()) <= 1e-4 * float(value.norm()), name
