"""NeMo's own scripts read our data, and say what is wrong themselves."""

import pytest

from tests.launching import launch

pytestmark = pytest.mark.unit
SCRIPT = """
import sys
import beside  # a module in the script's own folder
from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
from omegaconf import OmegaConf

entry = {"type": "mtbi", "cuts_path": sys.argv[1], "audio_locator_tag": "<|audio|>", "every_target": True}
data = {"input_cfg": [entry], "force_finite": True, "shuffle": False, "shard_seed": 0}
cuts, _ = read_cutset_from_config(OmegaConf.create(data))
print("conversations:", len(list(cuts)), __name__)
"""


def test_a_script_reads_conversations(manifest, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").touch()
    from tests.unit.data_helpers import conversations

    expected = len(conversations(manifest, every_target=True))
    assert f"conversations: {expected} __main__" in launch("nemo_script", tmp_path / "script.py", manifest)


def test_no_script():
    assert "usage: " in launch("nemo_script", ok=False)
    assert "'/no/script.py' is no file" in launch("nemo_script", "/no/script.py", ok=False)
