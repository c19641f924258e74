"""librosa's compiled functions, which whoever uses them first writes to a cache.

Of processes that compile them at once each writes a part, the parts do not fit each other, and whoever reads them
crashes, then and later (numba/numba#10128). So one process compiles them, alone, before the others use them.
"""

import hashlib
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import librosa
from filelock import FileLock

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.pretrained.offline import cache_dir

SECONDS = 600.0  # after which a lock is a dead host's; Timeout is an OSError
USE = """
import librosa, numpy
noise = numpy.random.default_rng(0).standard_normal(32000).astype("float32")
librosa.pyin(noise, fmin=60, fmax=500, sr=16000, frame_length=1024, hop_length=320)
librosa.feature.rms(y=noise, frame_length=400, hop_length=160)
"""


@cache
def require_compiled() -> None:
    """Compile what :mod:`nemo_mtbi.preparation.voice_measures` uses, once for an installation (15 s).

    Parts of before that crash are removed.

    Raises:
        ConfigError: librosa crashes all the same.
    """
    root = Path(librosa.__file__).parent
    known = [root, (root / "__init__.py").stat().st_ctime_ns, sys.version, version("numba")]
    known += [os.environ.get("NUMBA_CACHE_DIR")]
    done = cache_dir() / "compiled" / hashlib.blake2b(str(known).encode(), digest_size=8).hexdigest()
    try:
        done.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{done}.lock", timeout=SECONDS):
            if done.exists():
                return
            if not _runs():
                for file in root.rglob("*.nb[ic]"):
                    file.unlink(missing_ok=True)
                if not _runs():
                    raise ConfigError(
                        "librosa crashes in a process of its own. Let $NUMBA_CACHE_DIR name an empty folder, in which "
                        "its functions are compiled anew, or install it again."
                    )
            done.touch()
    except OSError:  # folders that can only be read: nothing is written there, so nothing can break
        return


def _runs() -> bool:
    return subprocess.run([sys.executable, "-c", USE], capture_output=True, check=False).returncode == 0
