"""Every system of the zoo beside its reference; `python -m tests.zoo` writes docs/zoo.md."""
