"""Run one of NeMo's own scripts with the plugin registered, so that it reads ``type: mtbi`` and our classes.

python -m nemo_mtbi.examples.nemo_script NeMo/scripts/speech_llm/estimate_token_bins.py ARGUMENT ...
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = f": {sys.argv[1]!r} is no file" if len(sys.argv) > 1 else ""
        print(f"usage: python -m nemo_mtbi.examples.nemo_script SCRIPT [ARGUMENT ...]{given}", file=sys.stderr)
        sys.exit(2)
    from nemo_mtbi import registration  # noqa: F401  registers the plugin with NeMo

    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
