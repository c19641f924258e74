"""Devices of a launcher, and ranks that meet."""

from contextlib import nullcontext

import pytest

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.parallel import launch

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("mps", 1, "use auto, cpu"),
        ("gpu", 1, "use auto, cpu"),
        ("cuda:99", 1, "no such device"),
        ("cpu", 2, "use auto"),
    ],
)
def test_devices_that_there_are_not(name, size, message):
    with pytest.raises(ConfigError, match=message):
        launch.chosen_device(name, size, "generate")


def test_a_rank_that_fails_does_not_wait_for_the_others(tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr(launch, "gathered_objects", lambda value, group: (met.append(value), [value])[1])
    with launch.once_per_node(lambda: nullcontext(tmp_path)) as folder:
        assert folder == tmp_path
    together = len(met)
    with pytest.raises(MemoryError), launch.once_per_node(lambda: nullcontext(tmp_path)):
        raise MemoryError
    assert len(met) - together == together - 1  # all but the last time
