"""An archive is unpacked once on each node, whatever the number of its ranks."""

import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.parallel.launch import once_per_node
from tests.launching import on_ranks

pytestmark = pytest.mark.distributed
RANKS = 3


def worker(rank, port, root, results):
    """What each rank makes, reads and sees: on two nodes; with a broken archive; where folders are not shared."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    socket.gethostname = lambda: f"node{rank % 2}"
    own = root / str(rank)

    @contextmanager
    def unpacked():
        made.append(rank)
        own.mkdir()
        (own / "weights").write_text(f"of node {rank % 2}")
        yield own
        (own / "weights").unlink()
        own.rmdir()

    @contextmanager
    def broken():
        raise CheckpointError("the archive is damaged")
        yield

    def read():
        with once_per_node(unpacked) as folder:
            return (folder / "weights").read_text()

    made = []
    out = {"read": read(), "made": list(made)}
    try:
        with once_per_node(broken):
            out["raised"] = None
    except CheckpointError as error:
        out["raised"] = str(error)
    is_dir = Path.is_dir
    Path.is_dir = lambda path: path == own and is_dir(path)
    out |= {"apart": read(), "made_apart": made[len(out["made"]) :]}
    Path.is_dir = is_dir
    results[rank] = out | {"left": own.exists()}
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_a_node_share_what_its_first_one_unpacks(tmp_path):
    got = on_ranks(RANKS, worker, 29561, tmp_path)
    for rank, own in enumerate(got):
        assert own["read"] == own["apart"] == f"of node {rank % 2}"
        assert own["made"] == [rank] * (rank < 2) and own["made_apart"] == [rank]
        assert own["raised"] == "the archive is damaged" and not own["left"]


def test_one_process_needs_nobody(tmp_path):
    @contextmanager
    def folder():
        yield tmp_path

    with once_per_node(folder) as own:
        assert own == tmp_path
