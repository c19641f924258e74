"""nemo_mtbi: Multi-Task Behavior Imitation (arXiv 2505.18644) for NVIDIA NeMo.

Importing this package is cheap on purpose (NeMo takes about 15 s to import): ``from nemo_mtbi.models import MTBISALM``
loads NeMo and registers the plugin with it, and so does ``import nemo_mtbi.registration``.
"""

from nemo_mtbi import _moved
from nemo_mtbi.version import __version__

_moved.install()

__all__ = ["__version__"]
