"""Reading and batching: prompts and pictures to tensors, answers to boxes."""

from mixformer.data.causal_mask import CausalMaskTransform
from mixformer.data.grounding import (
    Box,
    Point,
    draw_boxes,
    format_boxes,
    intersection_over_union,
    parse_boxes,
    parse_points,
)
from mixformer.data.processor import Processor, ProcessorConfig, TilingConfig, TrainingSample, load_processor

__all__ = [
    "Box",
    "CausalMaskTransform",
    "Point",
    "Processor",
    "ProcessorConfig",
    "TilingConfig",
    "TrainingSample",
    "draw_boxes",
    "format_boxes",
    "intersection_over_union",
    "load_processor",
    "parse_boxes",
    "parse_points",
]
