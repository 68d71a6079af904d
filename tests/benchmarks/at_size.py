"""A full-size model on a small machine: write a folder in HF's format, load it, look at a picture, answer.

    python -m tests.benchmarks.at_size cogagent          36.6 GB on disk, 4-bit in memory, within 16 GB
    python -m tests.benchmarks.at_size llama             13.5 GB on disk, bf16 in memory, within 15 GB
    python -m tests.benchmarks.at_size cogagent --part 0.1    a tenth of the layers, at full width
    python -m tests.benchmarks.at_size cogagent --small       a few thousand parameters, to see that it runs

The weights are random, from a seed, and scaled so that activations keep their size. Writing and running are processes
of their own. The peak is the largest resident set of the running one since it started, Python and torch included.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LIMITS = {"cogagent": 16e9, "llama": 15e9}
KINDS = {"cogagent": {"*": "int4"}, "llama": None}
QUESTION = 24  # tokens of text after the picture
ANSWER = 16
SHARD = "5GB"
_BLOCK = 2**24 + 43  # random numbers that are drawn once; a tensor takes a run of them from a place of its own


def config_of(name: str, part: float = 1.0, small: bool = False) -> Any:
    """The model's config.

    Args:
        name: `cogagent` or `llama`.
        part: of the layers of the language model and of the towers.
        small: a model of a few thousand parameters instead.
    """
    from models.cogagent import CogAgentConfig
    from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig
    from models.llama import LLaMAConfig

    def layers(number: int) -> int:
        return max(1, round(number * part))

    if not small:
        if name == "llama":
            return LLaMAConfig(num_layers=layers(32))
        return CogAgentConfig(
            num_layers=layers(32), vision=EVA2CLIPEConfig(num_layers=layers(63)),
            cross_vision=EVA2CLIPLConfig(num_layers=layers(24) + (part < 1), num_layers_run=layers(24) - (part == 1)),
        )
    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 96,
        "max_positions": 256,
    }
    if name == "llama":
        return LLaMAConfig(**sizes)
    width: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "inner_hidden_size": 64}
    tower = EVA2CLIPEConfig(image_size=28, **width)
    cross = EVA2CLIPLConfig(image_size=56, num_layers_run=1, **width)
    return CogAgentConfig(**sizes, vision=tower, cross_vision=cross)


# -------------------------------------------------------------------- writing


def write(name: str, folder: Path, part: float = 1.0, small: bool = False, seed: int = 0, shown: bool = True) -> int:
    """Write a folder in HF's format, tensor by tensor; returns the bytes of its tensors.

    Raises:
        OSError: the disk has no room for it.
    """
    from tqdm import tqdm

    from mixformer.contents import foreign_contents, reader
    from mixformer.shard_writer import write_shards
    from models.weights import HF_FORMATS

    model = config_of(name, part, small).build(device="meta", dtype=torch.bfloat16)
    contents = foreign_contents(model, HF_FORMATS, "HF")
    shapes = contents.tensors(reader(model))
    num_bytes, free = sum(tensor.nbytes for tensor in shapes.values()), shutil.disk_usage(folder.parent).free
    if num_bytes * 1.02 > free:
        raise OSError(f"{folder} needs {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there.")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = torch.randn(_BLOCK if not small else 2**16 + 43, generator=torch.Generator().manual_seed(seed))
    numbers = numbers.bfloat16()
    order = {file: index for index, file in enumerate(shapes)}

    def read(file: str) -> torch.Tensor:
        rule = contents.parts[file].rule
        assert rule is not None
        if rule.default is not None:
            return rule.default(model).to(shapes[file].dtype)
        return _values(rule.own, shapes[file], numbers, order[file] * 104_729)

    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Writing weights", disable=not shown or small) as bar:
        write_shards(folder, shapes, SHARD, read=read, progress=bar.update)
    contents.write_config(folder)
    return num_bytes


def _values(own: str, like: torch.Tensor, numbers: torch.Tensor, start: int) -> torch.Tensor:
    """Random numbers that keep activations at their size."""
    count, place = like.numel(), start % len(numbers)
    runs, left = [numbers[place:]], count - len(numbers) + place
    while left > 0:
        runs.append(numbers[:left])
        left -= len(numbers)
    found = torch.cat(runs)[:count].view(like.shape)
    kind = own.rpartition(".")[2]
    if like.dim() < 2 or kind in ("boi", "eoi", "cls"):
        return 1 + 0.1 * found if "norm" in own and kind == "weight" else 0.02 * found
    if "embedding" in own:
        return found * 0.5
    return found * (1 / math.sqrt(math.prod(like.shape[1:])))


# -------------------------------------------------------------------- running


def peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found if sys.platform == "darwin" else found * 1024


@torch.no_grad()
def run(folder: Path, quantise: Any, answer: int = ANSWER, threads: int = 2, shown: bool = True) -> dict[str, Any]:
    """Load a folder, run one picture and an answer, and return seconds of each stage and the peak.

    Raises:
        FloatingPointError: logits that are not finite.
    """
    from mixformer import KVCache, from_pretrained
    from mixformer.quantised import quantised_table

    torch.set_num_threads(threads)
    found: dict[str, Any] = {"peak at start": peak()}
    with timed(found, "loading"):
        model = from_pretrained(folder, quantise=quantise, progress=None if shown else False)
    gc.collect()
    found["peak of loading"] = peak()
    found["weights in memory"] = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if shown:
        print(quantised_table(model), file=sys.stderr)
    batch = _question(model)
    for name in ("image", "cross"):
        if name in model.mixins:
            _time_encoding(model.get_mixin(name), found, f"encoding ({name})")
    length = batch["input_ids"].shape[1]
    cache = KVCache(model, 1, length + answer)
    with timed(found, "prefill"):
        logits = model(**batch, cache=cache, last_only=True)
    found["prefill"] -= sum(seconds for stage, seconds in found.items() if stage.startswith("encoding"))
    found["tokens of the prompt"] = length
    seconds = []
    for _ in range(answer):
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("The logits are not finite.")
        token, start = logits[:, -1].argmax(-1), time.perf_counter()
        logits = model(token[:, None], cache=cache, last_only=True)
        seconds.append(time.perf_counter() - start)
    found["per token"] = sorted(seconds)[len(seconds) // 2]
    found["tokens per second"] = len(seconds) / sum(seconds)
    found["spread of logits"] = float(logits.float().std())
    found["peak"] = peak()
    return found


@contextmanager
def timed(found: dict[str, Any], stage: str) -> Iterator[None]:
    """Add the seconds of what is inside to a stage."""
    start = time.perf_counter()
    yield
    found[stage] = found.get(stage, 0.0) + time.perf_counter() - start


def _time_encoding(mixin: Any, found: dict[str, Any], stage: str) -> None:
    encode: Callable[..., torch.Tensor] = mixin.encode

    def measured(*arguments: Any, **options: Any) -> torch.Tensor:
        with timed(found, stage):
            return encode(*arguments, **options)

    mixin.encode = measured


def _question(model: Any) -> dict[str, torch.Tensor]:
    """A prompt with one random picture, if the model takes one."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    text = torch.randint(3, config.vocab_size, (1, QUESTION), generator=generator)
    if "image" not in model.mixins:
        return {"input_ids": text}
    tokens = config.vision.num_features + 2  # boi and eoi
    ids = torch.cat([torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, tokens, dtype=torch.int64), text], 1)
    types = torch.zeros_like(ids)
    types[:, 1 : 1 + tokens] = 1
    batch = {"input_ids": ids, "token_type_ids": types}
    for name, tower in (("images", config.vision), ("cross_images", config.cross_vision)):
        size = tower.image_size
        batch[name] = torch.randn(1, 3, size, size, generator=generator).bfloat16()
    return batch


# -------------------------------------------------------------------- the command


def measure(
    name: str, folder: Path, part: float = 1.0, small: bool = False, quantise: Any = None, threads: int = 2,
    answer: int = ANSWER, keep: bool = False, shown: bool = True,
) -> dict[str, Any]:
    """Write and run in processes of their own; the folder is deleted in the end unless it is to be kept."""
    options: dict[str, Any] = {"name": name, "folder": str(folder), "part": part, "small": small, "shown": shown}
    found: dict[str, Any] = {"model": name, "part of the layers": part}
    try:
        if not (folder / "config.json").is_file():
            found |= _child({"stage": "write", **options}, threads)
        rest = {"quantise": quantise, "answer": answer, "threads": threads}
        found |= _child({"stage": "run", **options, **rest}, threads)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    found["limit"] = LIMITS[name]
    return found


def _child(options: dict[str, Any], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "tests.benchmarks.at_size", "--child", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The stage '{options['stage']}' failed with exit code {done.returncode}.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _as_child(options: dict[str, Any]) -> dict[str, Any]:
    folder = Path(options["folder"])
    if options["stage"] == "write":
        found: dict[str, Any] = {}
        with timed(found, "writing"):
            size = write(options["name"], folder, options["part"], options["small"], shown=options["shown"])
        return {"bytes on disk": size, **found, "peak of writing": peak()}
    return run(folder, options["quantise"], options["answer"], options["threads"], options["shown"])


def table(found: dict[str, Any]) -> str:
    """The figures, a line each."""
    rows = []
    for name, value in found.items():
        if name in ("bytes on disk", "weights in memory", "limit") or name.startswith("peak"):
            text = f"{value / 1e9:.2f} GB"
        elif name in ("writing", "loading", "prefill", "per token") or name.startswith("encoding"):
            text = f"{value:.2f} s"
        else:
            text = f"{value:.2f}" if isinstance(value, float) else str(value)
        rows.append((name, text))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def main(arguments: list[str] | None = None) -> None:
    """The command; exit code 1 if the peak is above the model's limit."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.at_size", description=about)
    parser.add_argument("model", nargs="?", choices=list(LIMITS), help="what to write and run")
    parser.add_argument("--folder", type=Path, help="where the weights are written (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the folder there, and use what is in it")
    parser.add_argument("--part", type=float, default=1.0, help="of the layers (default: all)")
    parser.add_argument("--small", action="store_true", help="a few thousand parameters")
    parser.add_argument("--quantise", help="JSON: a kind, or {selector: kind}; default: int4 for cogagent")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens of the answer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(_as_child(options.child)))
        return
    if options.model is None:
        parser.error(f"name a model: {', '.join(LIMITS)}")
    quantise = KINDS[options.model] if options.quantise is None else json.loads(options.quantise)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mixformer-")) / options.model
    found = measure(
        options.model, folder, options.part, options.small, quantise, options.threads, options.answer, options.keep,
        shown=not options.json,
    )
    print(json.dumps(found, indent=2) if options.json else table(found))
    if found["peak"] > found["limit"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
