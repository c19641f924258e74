"""Connectors from encoder frames to the LLM's embedding space; each plugs in as NeMo's ``modality_adapter``."""

from nemo_mtbi.modules.connectors.base import Connector, SpeechEmbeddings
from nemo_mtbi.modules.connectors.ctc import CTCCompressConnector
from nemo_mtbi.modules.connectors.dense import ConvBottleneckConnector, StackMLPConnector
from nemo_mtbi.modules.connectors.two_channel import TwoChannelConnector
from nemo_mtbi.modules.connectors.whisper_decoder import WhisperDecoderConnector

__all__ = [
    "CTCCompressConnector",
    "Connector",
    "ConvBottleneckConnector",
    "SpeechEmbeddings",
    "StackMLPConnector",
    "TwoChannelConnector",
    "WhisperDecoderConnector",
]
