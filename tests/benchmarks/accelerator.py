"""What the cases on a GPU share: the device and its measured limits, waited-for times, counts of work and of waits."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mixformer import BaseModel

from .harness import SECONDS, Options, Run, Sample, Skipped
from .language import inference

WAITING_OPERATORS = (  # the last brings Python numbers to the device
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::bincount",
    "aten::_unique2", "aten::lift_fresh",
)
WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
COPY_TO_HOST = "Memcpy DtoH"
_INSIDE = "counted forward"


def pick_device(options: Options) -> torch.device:
    """The GPU; in a quick run a CPU will do. Memory of earlier cases is given back.

    Raises:
        Skipped: there is none.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return torch.device("cuda", torch.cuda.current_device())
    if not options.quick:
        raise Skipped("no CUDA device is available; on a CPU this only runs with --quick, as a smoke test")
    return torch.device("cpu")


def require_memory(device: torch.device, gigabytes: float, what: str) -> None:
    """Give back what is unused, and see that there is room.

    Raises:
        Skipped: there is too little.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0] / 1e9
        if free < gigabytes:
            raise Skipped(f"{what} takes {gigabytes:.0f} GB, and {free:.0f} GB of the GPU are free")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Tensors made in here are there and of that type, unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def compile_for(device: torch.device, function: Any) -> Any:
    """One graph; on a CPU, where it is a smoke test, run without a compiler."""
    return torch.compile(function, fullgraph=True, backend="inductor" if device.type == "cuda" else "eager")


def timed(
    call: Callable[[], Any], calls: int = 1, reset: Callable[[], Any] | None = None, *,
    output: Callable[[], Any] | None = None, rates: dict[str, float] | None = None, compared: bool = True,
) -> Run:
    """A competitor whose calls are launched one behind the other and waited for at the end.

    Args:
        call: what is timed.
        calls: how many in one sample.
        reset: called after them, outside the clock.
        output: gives what is compared, if not the result of `call`.
        rates: {figure: amount of one call}; shown per second.
        compared: as of `Run`.
    """

    def measured() -> Sample:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        seconds = (time.perf_counter() - start) / calls
        if reset is not None:
            reset()
        return {SECONDS: seconds, **{figure: amount / seconds for figure, amount in (rates or {}).items()}}

    return Run(measured, reset, output or call, compared, measured=True)


def copying(device: torch.device, num_bytes: int, calls: int) -> Run:
    """A copy on the device; what is read and what is written both count."""
    source = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), calls, rates={"TB/s": 2 * num_bytes / 1e12}, compared=False)


def multiplying(device: torch.device, size: int, calls: int) -> Run:
    """A square bf16 product."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(left)
    call = inference(lambda: torch.mm(left, right, out=out))
    return timed(call, calls, rates={"TFLOP/s": 2 * size**3 / 1e12}, compared=False)


@dataclass(frozen=True)
class Limits:
    """What the device was measured to do, in bytes and operations per second."""

    copy: float
    product: float


def limit_runs(options: Options, device: torch.device) -> dict[str, Run]:
    """The copy and the matrix product that other cases are held against."""
    return {
        "copy": copying(device, options.pick(2**32, 2**12), options.pick(10, 1)),
        "matrix product": multiplying(device, options.pick(8192, 16), options.pick(20, 1)),
    }


@functools.lru_cache(maxsize=2)
def measure_limits(options: Options, device: torch.device) -> Limits:
    """Medians of 10 samples, once per process."""
    found = []
    for run, figure in zip(limit_runs(options, device).values(), ("TB/s", "TFLOP/s"), strict=True):
        run.call()
        found.append(statistics.median(run.call()[figure] for _ in range(10)) * 1e12)
    return Limits(*found)


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on the device."""
    return {name: value.to(device) for name, value in batch.items()}


def layer_weights(model: BaseModel) -> list[torch.Tensor]:
    """Matrices of the language layers, without those of experts."""
    return [
        module.weight.detach() for name, module in model.transformer.layers.named_modules()
        if isinstance(module, nn.Linear) and ".mixins." not in f".{name}."
    ]


def head_weight(model: BaseModel) -> torch.Tensor:
    """[v, h]."""
    head: Any = model.mixins["head"]
    return head.linear.weight.detach()


def bytes_per_token(model: BaseModel) -> int:
    """Bytes of the weights that a decoding step about text reads: layers, final norm and head."""
    own = [p for name, p in model.transformer.named_parameters() if ".mixins." not in name]
    embeddings: Any = model.transformer.word_embeddings
    read = [*(p for p in own if p is not embeddings.weight), head_weight(model)]
    return sum(p.numel() * p.element_size() for p in read)


def product_flops(model: BaseModel, num_tokens: int, num_logits: int) -> float:
    """Operations of a forward's matrix products, two for each multiply-add.

    Args:
        model: a LLaMA.
        num_tokens: of all rows together.
        num_logits: how many of them get logits.
    """
    layers = sum(weight.numel() for weight in layer_weights(model))
    return 2.0 * (num_tokens * layers + num_logits * head_weight(model).numel())


def attention_flops(model: BaseModel, num_rows: int, num_tokens: int) -> float:
    """Operations of a forward's attention, two for each multiply-add, over a token and those before it only."""
    config = model.config
    pairs = num_rows * num_tokens * (num_tokens + 1) // 2
    return 2.0 * 2 * pairs * config.layers_run * config.num_heads * config.head_width


def products_alone(model: BaseModel, num_tokens: int, num_logits: int, backward: bool = False) -> Callable[[], None]:
    """The matrix products of a forward over so many tokens in all, and of the backward, and nothing else."""
    weights = [(weight, num_tokens) for weight in layer_weights(model)] + [(head_weight(model), num_logits)]
    made: dict[tuple[int, int], torch.Tensor] = {}
    for weight, rows in weights:
        for size in weight.shape:
            made.setdefault((rows, size), torch.randn(rows, size, dtype=weight.dtype, device=weight.device))

    def run() -> None:
        for weight, rows in weights:
            torch.mm(made[rows, weight.shape[1]], weight.t())
        for weight, rows in reversed(weights if backward else []):
            gradient, x = (made[rows, size] for size in weight.shape)
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)

    return inference(run)


def host_waits(call: Callable[[], Any]) -> Counter[str]:
    """What makes the host wait for the device while `call` runs, from the profiler.

    Counted are operators that need the host to know values; with a GPU also calls that wait, and copies to the host.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    synchronize()
    with profile(activities=activities) as profiler:
        with record_function(_INSIDE):
            call()
        synchronize()
    events = profiler.events() or []
    inside = next(x.time_range for x in events if x.name == _INSIDE and x.device_type == DeviceType.CPU)
    found: Counter[str] = Counter()
    for event in events:
        if event.name.startswith(COPY_TO_HOST):
            found[COPY_TO_HOST] += 1
        elif event.name in (*WAITING_OPERATORS, *WAITING_CALLS):
            found[event.name] += inside.start <= event.time_range.start <= inside.end
    return +found


def refused_waits(call: Callable[[], Any]) -> bool:
    """Whether torch's own check for waits, on a GPU, stops the call."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
