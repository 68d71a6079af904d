"""Benchmarks against peers: `python -m tests.benchmarks [names] --json FILE --markdown FILE`."""
