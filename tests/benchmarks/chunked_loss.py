"""The loss of supervised tokens a chunk at a time, against all logits at once: peak memory and time."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from mixformer.objectives import LanguageObjective
from mixformer.testing import jitter
from models.llama import LLaMA, LLaMAConfig

from .harness import Group, Options, Run, Sample, case
from .loading import Peak, child
from .peers import FULL, QUICK
from .training import trained

IN_USE, RESIDENT = "peak MiB in use", "peak MiB resident"


@dataclass(frozen=True)
class Work:
    """What is learnt, so that a child process can make it again.

    Attributes:
        sizes: of the model.
        rows, tokens: of the batch.
        supervised: share of the tokens that are learnt.
        chunk: of the loss; None for all logits at once.
    """

    sizes: dict[str, Any]
    rows: int
    tokens: int
    supervised: float
    chunk: int | None = None

    def made(self) -> tuple[LLaMA, dict[str, torch.Tensor]]:
        """Model and batch; both follow from seeds."""
        model = LLaMA(LLaMAConfig(**self.sizes), generator=torch.Generator().manual_seed(0))
        jitter(model, scale=0.01)
        draws, shape = torch.Generator().manual_seed(1), (self.rows, self.tokens)
        ids = torch.randint(self.sizes["vocab_size"], shape, generator=draws)
        learnt = torch.rand(shape, generator=draws) < self.supervised
        return model, {"input_ids": ids, "labels": ids.masked_fill(~learnt, -100)}

    def peaks(self, threads: int, figures: tuple[str, ...]) -> Sample:
        """Peaks of a step, each in a new process."""
        arguments = ["-m", "tests.benchmarks.chunked_loss", json.dumps(asdict(self))]
        return {figure: child([*arguments, figure], threads) / 2**20 for figure in figures}


@case("chunked_loss", "Training with the loss in chunks")
def chunked_loss(options: Options) -> Iterator[Group]:
    """Loss and gradients of 4 rows of 512 tokens with a vocabulary of 32,000 and 2 layers; all weights train, and
    layers are run again in the backward pass. All logits at once are one number for each token and word, several times
    over with what their gradients need; in chunks only the tokens that are learnt go through the head, so many at a
    time, and once more in the backward pass. First all tokens are learnt, then an eighth of them, as where only short
    answers are. Peaks are those of new processes, over what is there before the step: weights and the gradients of a
    step before it. What is in use is measured with an allocator that gives every block of 64 KiB or more back at once,
    what is resident with the system's own, which keeps freed blocks for later."""
    full = {**FULL, "vocab_size": 32000, "num_layers": 2, "checkpoint_activations": True}
    sizes, rows, tokens = options.pick((full, 4, 512), ({**QUICK, "vocab_size": 8000}, 4, 128))
    figures = options.pick((IN_USE, RESIDENT), (IN_USE,))
    for supervised, chunks in ((1.0, (64, 256)), (0.125, (64,)))[: options.pick(2, 1)]:
        works = {"all logits": Work(sizes, rows, tokens, supervised)}
        for chunk in options.pick(chunks, (64,)):
            works[f"chunks of {chunk}"] = Work(sizes, rows, tokens, supervised, chunk)
        model, batch = works["all logits"].made()
        runs: dict[str, Run] = {}
        batches: Any = partial(list, [batch])
        for name, work in works.items():
            runs[name] = trained(model, batches, LanguageObjective(chunk=work.chunk))
            runs[name].once = partial(work.peaks, options.threads, figures)
        weights = sum(weight.numel() for weight in model.parameters())
        counts = {"weights, and of gradients": weights, "all logits": rows * tokens * sizes["vocab_size"]}
        facts = {f"MiB of {name}": 4 * count / 2**20 for name, count in counts.items()}
        title = "all tokens learnt" if supervised == 1 else f"{supervised:.1%} of the tokens learnt"
        yield Group(title, runs, ("all logits",), rounds=5, warmup=0, facts=facts, ratios_of=figures)


def main(work: str, figure: str) -> None:
    """Print by how many bytes the peak of a step exceeds what was there before."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    system: Any = ctypes.CDLL(None)
    if figure == IN_USE and hasattr(system, "mallopt"):
        system.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: larger blocks are mapped, and go back when they are freed
    given = Work(**json.loads(work))
    model, batch = given.made()
    few = {"input_ids": batch["input_ids"][:1, :8], "labels": batch["input_ids"][:1, :8]}
    objective = LanguageObjective(chunk=given.chunk)
    warm, run = trained(model, lambda: [few], objective), trained(model, lambda: [batch], objective)
    warm.call()
    peak = Peak()
    run.call()
    print(json.dumps(peak.added()))


if __name__ == "__main__":
    main(*sys.argv[1:])
