"""Importing this package loads NeMo and registers the plugin with it."""

from nemo_mtbi.process import collection_paused

with collection_paused():
    from nemo_mtbi import registration as registration
    from nemo_mtbi.models.mtbi_salm import MTBISALM

__all__ = ["MTBISALM"]
