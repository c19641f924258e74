"""The speech LLM. ``MTBISALM`` loads NeMo and registers the plugin with it when it is first asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_mtbi.models.mtbi_salm import MTBISALM

__all__ = ["MTBISALM"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nemo_mtbi.process import collection_paused

    with collection_paused():
        from nemo_mtbi.models.mtbi_salm import MTBISALM
    return MTBISALM
