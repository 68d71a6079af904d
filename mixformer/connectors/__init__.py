"""Projectors and resamplers between towers and language models: plain modules, no hooks of their own."""
