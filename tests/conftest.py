"""Fixtures shared by all tests; the pretrained parts are converted once into the ordinary cache."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real human speech kept beside the project by its developers; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}: this test reads the developers' shared speech")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2() -> str:
    from nemo_mtbi.pretrained.offline import resolve_pretrained

    return resolve_pretrained("offline:smollm2-135m-instruct")


@pytest.fixture(scope="session")
def whisper() -> str:
    from nemo_mtbi.pretrained.offline import resolve_pretrained

    return resolve_pretrained("offline:whisper-tiny.en")
