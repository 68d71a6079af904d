"""A full-size model on a small machine: write a folder in HF's format, load it, look at a picture, answer.

    python -m tests.benchmarks.at_size cogagent          36.6 GB on disk, 4-bit in memory, within 16 GB
    python -m tests.benchmarks.at_size llama             13.5 GB on disk, bf16 in memory, within 15 GB
    python -m tests.benchmarks.at_size cogagent --steps 2     and then trains a LoRA for two steps
    python -m tests.benchmarks.at_size cogagent --part 0.1    a tenth of the layers, at full width
    python -m tests.benchmarks.at_size cogagent --small       a few thousand parameters, to see that it runs

The weights are random, from a seed, and scaled so that activations keep their size. They go to a temporary folder,
which is deleted in the end; a folder that `--folder` names stays and is used again as it is. Writing and running are
processes of their own. The peak is the largest resident set of the running one since it started, Python and torch
included; what the system caches of files is no part of it.
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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
LIMITS = {"cogagent": 16e9, "llama": 15e9}
KINDS = {"cogagent": {"*": "int4"}, "llama": None}
QUESTION = 24  # tokens of text after the picture
ANSWER = 16
SHARD = "5GB"
SECONDS = ("writing", "checking", "loading", "prefill", "per token", "seconds per step")
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
    """Write a folder in HF's format, tensor by tensor, unless it is there; returns the bytes of its tensors.

    Raises:
        OSError: the disk has no room for it.
        ValueError: the folder holds something else.
    """
    from tqdm import tqdm

    from mixformer.contents import foreign_contents, reader
    from mixformer.shard_writer import write_shards
    from models.weights import HF_FORMATS

    model = config_of(name, part, small).build(device="meta", dtype=torch.bfloat16)
    contents = foreign_contents(model, HF_FORMATS, "HF")
    shapes = contents.tensors(reader(model))
    num_bytes = sum(tensor.nbytes for tensor in shapes.values())
    if (folder / "config.json").is_file():  # it is written last
        _check_written(folder, shapes)
        return num_bytes
    begun = folder / "unfinished"
    if folder.exists() and any(folder.iterdir()) and not begun.exists():
        raise ValueError(f"{folder} holds something else and is left as it is. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    begun.touch()
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # shards that take their old places
    free = shutil.disk_usage(folder).free + written
    if num_bytes * 1.02 > free:
        raise OSError(f"{folder} needs {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there.")
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
    begun.unlink()
    return num_bytes


def _check_written(folder: Path, expected: Mapping[str, torch.Tensor]) -> None:
    from mixformer.shards import SafetensorsFolder

    source = SafetensorsFolder(folder)
    source.close()
    found = {name: (shape, source.dtypes[name]) for name, shape in source.shapes.items()}
    if found != {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()}:
        raise ValueError(f"{folder} holds another model, or another part of it. Name another folder.")


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


def run(
    folder: Path, quantise: Any, answer: int = ANSWER, threads: int = 2, shown: bool = True, steps: int = 0
) -> dict[str, Any]:
    """Load a folder, run one picture and an answer, train a LoRA, and return seconds of each stage and the peaks.

    Raises:
        FloatingPointError: logits or losses that are not finite.
    """
    from mixformer import from_pretrained
    from mixformer.quantised import quantised_table

    torch.set_num_threads(threads)
    found: dict[str, Any] = {"peak at start": peak()}
    with _timed(found, "loading", shown):
        model = from_pretrained(folder, quantise=quantise, progress=None if shown else False)
    gc.collect()
    found["peak of loading"] = peak()
    found["weights in memory"] = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if shown:
        print(quantised_table(model), file=sys.stderr)
    _answer(model, answer, found, shown)
    found["peak"] = peak()
    if steps:
        _train_lora(model, steps, found, shown)
    return found


@torch.no_grad()
def _answer(model: Any, answer: int, found: dict[str, Any], shown: bool) -> None:
    from mixformer import KVCache

    batch = _question(model)
    encoders = {name: model.get_mixin(name) for name in ("image", "cross") if name in model.mixins}
    for name, encoder in encoders.items():
        _time_encoding(encoder, found, f"encoding ({name})", shown)
    length = batch["input_ids"].shape[1]
    cache = KVCache(model, 1, length + answer)
    with _timed(found, "prefill"):
        logits = model(**batch, cache=cache, last_only=True)
    found["prefill"] -= sum(seconds for stage, seconds in found.items() if stage.startswith("encoding"))
    if shown:
        print(f"prefill: {found['prefill']:.1f} s", file=sys.stderr, flush=True)
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
    for encoder in encoders.values():
        del encoder.encode


def _train_lora(model: Any, steps: int, found: dict[str, Any], shown: bool) -> None:
    from mixformer.mixins import LoRAMixin
    from mixformer.train import TrainConfig, train

    model.add_mixin("lora", LoRAMixin(["qkv", "dense", "gate", "up", "down"], rank=8))
    batch = _question(model)
    labels = batch["input_ids"].clone()
    labels[:, :-QUESTION] = -100
    losses = []
    for _ in range(steps):
        options = TrainConfig(steps=1, warmup_steps=0, schedule="constant", trainable=["lora"], progress=False)
        with _timed(found, "training"):
            losses.append(train(model, [{**batch, "labels": labels}], options)["total"])
    found["seconds per step"] = found.pop("training") / steps
    found["losses"] = losses
    found["peak of training"] = peak()
    if shown:
        print(f"a LoRA's step: {found['seconds per step']:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _timed(found: dict[str, Any], stage: str, shown: bool = False) -> Iterator[None]:
    """Add the seconds of what is inside to a stage."""
    start = time.perf_counter()
    yield
    found[stage] = found.get(stage, 0.0) + time.perf_counter() - start
    if shown:
        print(f"{stage}: {found[stage]:.1f} s", file=sys.stderr, flush=True)


def _time_encoding(mixin: Any, found: dict[str, Any], stage: str, shown: bool) -> None:
    encode: Callable[..., torch.Tensor] = mixin.encode

    def measured(*arguments: Any, **options: Any) -> torch.Tensor:
        with _timed(found, stage, shown):
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
    answer: int = ANSWER, shown: bool = True, steps: int = 0,
) -> dict[str, Any]:
    """Write and run in processes of their own."""
    options: dict[str, Any] = {
        "name": name, "folder": str(folder), "part": part, "small": small, "shown": shown, "quantise": quantise,
        "answer": answer, "threads": threads, "steps": steps,
    }
    found: dict[str, Any] = {"model": name, "part of the layers": part}
    for stage in ("write", "run"):
        found |= _child({"stage": stage, **options}, threads)
    return {**found, "limit": LIMITS[name]}


def _child(options: dict[str, Any], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "tests.benchmarks.at_size", "--child", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The stage '{options['stage']}' failed with exit code {done.returncode}; see above.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _as_child(options: dict[str, Any]) -> dict[str, Any]:
    folder = Path(options["folder"])
    if options["stage"] == "write":
        _check_choices(config_of(options["name"], options["part"], options["small"]), options["quantise"])
        found: dict[str, Any] = {}
        is_new = not (folder / "config.json").is_file()
        with _timed(found, "writing" if is_new else "checking", options["shown"]):
            size = write(options["name"], folder, options["part"], options["small"], shown=options["shown"])
        return {"bytes on disk": size, **found, **({"peak of writing": peak()} if is_new else {})}
    return run(
        folder, options["quantise"], options["answer"], options["threads"], options["shown"], options["steps"]
    )


def _check_choices(config: Any, quantise: Any) -> None:
    """See to it that a wish that cannot be met is told before anything is written."""
    from mixformer.quantised import choose, torchao

    if quantise:
        torchao()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the weights are read
            choose(config.build(device="meta"), quantise)


def table(found: dict[str, Any]) -> str:
    """The figures, a line each."""
    rows = []
    for name, value in found.items():
        if name in ("bytes on disk", "weights in memory", "limit") or name.startswith("peak"):
            text = f"{value / 1e9:.2f} GB"
        elif name in SECONDS or name.startswith("encoding"):
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
    parser.add_argument("--folder", type=Path, help="where the weights are written, or are (default: a temporary one)")
    parser.add_argument("--part", type=float, default=1.0, help="of the layers (default: all)")
    parser.add_argument("--small", action="store_true", help="a few thousand parameters")
    parser.add_argument("--quantise", help="a kind, {selector: kind}, or none (default: int4 for cogagent)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens of the answer")
    parser.add_argument("--steps", type=int, default=0, help="of training a LoRA on the answered question (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        try:
            print(json.dumps(_as_child(options.child)))
        except (OSError, ValueError, FloatingPointError) as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        return
    if options.model is None:
        parser.error(f"name a model: {', '.join(LIMITS)}")
    quantise = KINDS[options.model] if options.quantise is None else yaml.safe_load(options.quantise)
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
        found = measure(
            options.model, Path(folder), options.part, options.small, None if quantise == "none" else quantise,
            options.threads, options.answer, not options.json, options.steps,
        )
    print(json.dumps(found, indent=2) if options.json else table(found))
    if found["peak"] > found["limit"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
