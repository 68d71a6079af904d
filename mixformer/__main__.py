"""`python -m mixformer`: the verbs of the console script."""

from mixformer.cli import console

if __name__ == "__main__":
    console()
