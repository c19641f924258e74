"""Compiled functions of librosa that crash are compiled anew, by one process."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.preparation import compiled

pytestmark = pytest.mark.unit


@pytest.fixture
def librosa(tmp_path, monkeypatch):
    """A package with a compiled function; what its users return, one after the other."""
    monkeypatch.setenv("NEMO_MTBI_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "librosa"
    (root / "core").mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "core" / "guf-pitch.nbi").touch()
    monkeypatch.setattr(compiled, "librosa", SimpleNamespace(__file__=str(root / "__init__.py")))
    used = []

    def use(codes):
        def run(command, **_):
            used.append(command)
            return SimpleNamespace(returncode=codes[len(used) - 1])

        monkeypatch.setattr(subprocess, "run", run)
        compiled.require_compiled.__wrapped__()
        return len(used)

    return root, use


def test_it_is_done_once(librosa):
    root, use = librosa
    assert use([0]) == 1 and use([]) == 1  # the second time nobody has to try
    assert list(root.rglob("*.nbi"))
    (root / "__init__.py").unlink()  # installed again
    (root / "__init__.py").touch()
    assert use([0, 0]) == 2


def test_what_crashes_is_compiled_anew(librosa):
    root, use = librosa
    assert use([-11, 0]) == 2 and not list(root.rglob("*.nbi"))


def test_what_crashes_all_the_same_is_said(librosa):
    _, use = librosa
    with pytest.raises(ConfigError, match="NUMBA_CACHE_DIR"):
        use([-11, -11])


def test_what_is_tried_is_what_is_used():
    assert subprocess.run([sys.executable, "-c", compiled.USE], capture_output=True, check=False).returncode == 0
