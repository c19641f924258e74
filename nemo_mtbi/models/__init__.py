"""Importing this package loads NeMo and registers the plugin with it."""

from nemo_mtbi import registration as registration
from nemo_mtbi.models.mtbi_salm import MTBISALM

__all__ = ["MTBISALM"]
