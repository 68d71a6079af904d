"""Compose transformers out of mixins."""

from mixformer.cache import KVCache
from mixformer.checkpoint import from_pretrained, save_pretrained
from mixformer.config import TransformerConfig
from mixformer.context import Context
from mixformer.conversation import Conversation
from mixformer.data.processor import load_processor
from mixformer.generate import generate
from mixformer.hooks import replace, wrap
from mixformer.mixin import BaseMixin
from mixformer.model import BaseModel, Output
from mixformer.sites import Linear, SiteMixin
from mixformer.slots import generate_queue

__all__ = [
    "BaseMixin", "BaseModel", "Context", "Conversation", "KVCache", "Linear", "Output", "SiteMixin",
    "TransformerConfig", "from_pretrained", "generate", "generate_queue", "load_processor", "replace",
    "save_pretrained", "wrap",
]
