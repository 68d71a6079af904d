"""Import time, and loading of weights: each sample is a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .harness import SECONDS, Group, Options, Run, Sample, case

ROOT = Path(__file__).parents[2]
PEAK = "peak memory / weights"
SIZES: dict[str, Any] = {
    "vocab_size": 8000, "hidden_size": 1024, "num_layers": 7, "num_heads": 16, "inner_hidden_size": 2752,
    "max_positions": 2048,
}


def child(arguments: list[str], threads: int) -> Any:
    """What a new Python prints as JSON on its last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"A child process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@case("import", "Import time")
def import_time(options: Options) -> Iterator[Group]:
    """The `import` statement alone, in a new process each time, with its files in the page cache."""
    statements = {
        "torch": "import torch", "mixformer": "import mixformer",
        "mixformer and models.llama": "import mixformer; from models.llama import LLaMA",
    }
    skipped = {}
    if importlib.util.find_spec("transformers") is None:
        skipped["HF"] = "transformers is not installed"
    else:
        statements["HF, import transformers"] = "import transformers"
        statements["HF, LlamaForCausalLM"] = "from transformers import LlamaForCausalLM"
    if options.quick:
        statements = dict(list(statements.items())[:2])

    def run(statement: str) -> Run:
        code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
        return Run(lambda: {SECONDS: child(["-c", code], options.threads)}, compared=False, measured=True)

    runs = {name: run(statement) for name, statement in statements.items()}
    yield Group("one import", runs, ("torch",), rounds=9, warmup=1, skipped=skipped)


@case("load", "Loading weights")
def load(options: Options) -> Iterator[Group]:
    """About 400 MB of fp32 in shards of 100 MB, in the page cache; a new process each time. The time runs from the call
    until every weight has been read once, without imports. Memory is what the peak of the resident set grows by, over
    the size of the weights. The floor: `safetensors.torch.load_file` of each shard, and `load_state_dict(assign=True)`
    into a model without memory. By default our own format also checks the SHA-256 of every shard."""
    from mixformer import save_pretrained
    from models.llama import LLaMAConfig

    from .peers import QUICK

    names = ["floor", "mixformer, own format", "mixformer, own format, verify=False", "mixformer, HF format"]
    skipped = {}
    if importlib.util.find_spec("transformers") is None:
        skipped["HF"] = "transformers is not installed"
    elif not options.quick:
        names.append("HF")
    sizes = options.pick(SIZES, QUICK)
    model = LLaMAConfig(**sizes).build(generator=torch.Generator().manual_seed(0))
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        for format in ("own", "hf"):
            save_pretrained(model, Path(folder) / format, format, max_shard_size="100MB")
        (Path(folder) / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
        del model

        def run(name: str) -> Run:
            def call() -> dict[str, Any]:
                return dict(child(["-m", "tests.benchmarks.loading", name, folder], options.threads))

            def timed() -> Sample:
                found = call()
                return {SECONDS: found["seconds"], PEAK: found["bytes"] / num_bytes}

            return Run(timed, output=lambda: torch.tensor(call()["logits"]), measured=True)

        runs = {name: run(name) for name in names}
        yield Group(f"{num_bytes / 1e6:.0f} MB", runs, rounds=7, warmup=0, skipped=skipped)


# ------------------------------------------------------------------ inside a child process


def floor_loader(folder: Path) -> Callable[[], torch.nn.Module]:
    """Loads the floor from shards in our own format."""
    from safetensors.torch import load_file

    from models.llama import LLaMAConfig

    from .floor import FloorLLaMA, floor_name

    config = LLaMAConfig(**json.loads((folder.parent / "sizes.json").read_text(encoding="utf-8")))

    def load() -> torch.nn.Module:
        with torch.device("meta"):
            model = FloorLLaMA(config)
        state = {}
        for shard in sorted(folder.glob("model*.safetensors")):
            state |= {floor_name(name): tensor for name, tensor in load_file(shard).items()}
        model.load_state_dict(state, assign=True)
        return model

    return load


def loader(name: str, folder: Path) -> Callable[[], torch.nn.Module]:
    """What one competitor does, with everything imported."""
    if name == "floor":
        return floor_loader(folder / "own")
    if name == "HF":
        from transformers import LlamaForCausalLM

        return lambda: LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    import models.weights  # noqa: F401
    from mixformer import from_pretrained

    place = folder / ("hf" if name.endswith("HF format") else "own")
    return lambda: from_pretrained(place, verify=not name.endswith("verify=False"))  # type: ignore[no-any-return]


class Peak:
    """By how many bytes the largest resident set since it was made exceeds that at the time."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
        except OSError:
            pass
        self.before = self._now()

    def added(self) -> int:
        """Bytes."""
        return self._now() - self.before

    def _now(self) -> int:
        try:  # getrusage would count the process that started this one
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def main(name: str, folder: str) -> None:
    """Load once and print what it took."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.ones(8, 8) @ torch.ones(8, 8)
    run = loader(name, Path(folder))
    peak, start = Peak(), time.perf_counter()
    model = run()
    for parameter in model.parameters():
        parameter.sum()
    seconds, added = time.perf_counter() - start, peak.added()
    logits = model(torch.arange(8)[None])
    logits = getattr(logits, "logits", logits)
    print(json.dumps({"seconds": seconds, "bytes": added, "logits": logits[0, -1, :50].tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
