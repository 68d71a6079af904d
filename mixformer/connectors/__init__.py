"""Projectors and resamplers between towers and language models: plain modules, no hooks of their own."""

from mixformer.connectors.abstractor import VisualAbstractorConfig
from mixformer.connectors.attention_pooler import AttentionPoolerConfig
from mixformer.connectors.connector import ConnectorConfig
from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.connectors.ldp import LDPConfig, LDPv2Config
from mixformer.connectors.perceiver import PerceiverResamplerConfig
from mixformer.connectors.prefix_mapper import PrefixMapperConfig
from mixformer.connectors.projector import ProjectorConfig

__all__ = [
    "AttentionPoolerConfig", "ConnectorConfig", "GLUAdapterConfig", "LDPConfig", "LDPv2Config",
    "PerceiverResamplerConfig", "PrefixMapperConfig", "ProjectorConfig", "VisualAbstractorConfig",
]
