"""Checkpoints from one format to another."""

from mixformer.conversion.run import FORMATS, Report, convert

__all__ = ["FORMATS", "Report", "convert"]
