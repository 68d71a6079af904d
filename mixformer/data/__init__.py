"""Reading and batching: prompts and pictures to tensors, answers to boxes."""

from mixformer.data.grounding import (
    Box,
    Point,
    draw_boxes,
    format_boxes,
    intersection_over_union,
    parse_boxes,
    parse_points,
)
from mixformer.data.processor import Processor, ProcessorConfig, TrainingSample, load_processor

__all__ = [
    "Box",
    "Point",
    "Processor",
    "ProcessorConfig",
    "TrainingSample",
    "draw_boxes",
    "format_boxes",
    "intersection_over_union",
    "load_processor",
    "parse_boxes",
    "parse_points",
]
