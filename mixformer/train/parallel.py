"""Engines of several processes on torch's own: DDP for small models, FSDP2 for those that one device cannot hold.

Every process calls the same methods in the same order. `torchrun --nproc-per-node N` starts the processes, and
`engine_of` sees them. A state is a folder that any number of processes can read, with either engine or none.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import itertools
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from mixformer.train.engine import Engine
from mixformer.train.state import atomic_save, put_in_place, remove
from mixformer.transformer import Layer

CHOICES = ("auto", "single", "ddp", "fsdp")
LARGE = 1_000_000_000  # parameters from which `auto` shards
_LETTING_GO = 0.2  # seconds
Losses = dict[str, torch.Tensor]
Loss = Callable[[Any, Any], Losses]


def engine_of(choice: str = "auto", model: nn.Module | None = None, replicas: int = 1, minutes: float = 30) -> Engine:
    """The engine for the processes that torchrun started, or for this one.

    Args:
        choice: `single`, `ddp`, `fsdp`, or `auto`: FSDP2 for models of a billion parameters or more, DDP for others.
        model: what is to be trained, for `auto`.
        replicas: into how many groups of processes FSDP2 divides them, each of which holds all weights (HSDP).
        minutes: how long a process waits for the others.

    Raises:
        ValueError: an unknown choice, one that needs torchrun without it, or replicas that do not divide.
    """
    if choice not in CHOICES:
        raise ValueError(f"The engine {choice!r} is not known; choose one of {', '.join(CHOICES)}.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if choice == "single" and world_size > 1:
        raise ValueError(
            f"engine 'single' is for one process, but {world_size} were started; each would train a model of its own. "
            f"Choose auto, ddp or fsdp, or start it without torchrun."
        )
    if choice == "single" or (choice == "auto" and world_size == 1):
        return Engine()
    if "RANK" not in os.environ and not dist.is_initialized():
        raise ValueError(
            f"engine '{choice}' is for processes that torchrun starts, and there are none here. Run `torchrun "
            f"--nproc-per-node N -m ...`, or choose auto."
        )
    num_parameters = 0 if model is None else sum(parameter.numel() for parameter in model.parameters())
    if choice == "fsdp" or (choice == "auto" and num_parameters >= LARGE):
        return Sharded(replicas, minutes)
    return Replicated(minutes)


class _Called(nn.Module):
    """The root that torch's engines wrap: its forward is the loss, so that all that the loss does is inside.

    Where a batch uses nothing that is trained, its losses require gradients nevertheless: a process takes part in the
    exchange of gradients by its backward.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.spare: torch.Tensor | None = None

    def forward(self, loss: Loss, batch: Any) -> Losses:
        losses = loss(self.model, batch)
        if torch.is_grad_enabled() and not any(value.requires_grad for value in losses.values()):
            if self.spare is None:
                return {name: value.detach().requires_grad_() for name, value in losses.items()}
            return {name: value + 0.0 * self.spare.sum() for name, value in losses.items()}
        return losses


class ParallelEngine(Engine):
    """What DDP and FSDP2 have in common: the group of processes, sums over it, and the training state.

    Args:
        minutes: how long a process waits for the others.
    """

    state_is_folder = True

    def __init__(self, minutes: float = 30) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            # Its functions keep the group that there is when it is imported, as a default: so it is imported before.
            importlib.import_module("torch.distributed.nn.functional")
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.gradient_scale = float(self.world_size)  # torch's engines average
        self._model: Any = None
        self._root: Any = None
        self._ran = False
        atexit.register(self.close)

    def losses(self, model: Any, loss: Loss, batch: Any) -> Losses:
        """As of `Engine`.

        Raises:
            ValueError: the model was not prepared.
        """
        if self._root is None or self._model is not model:
            raise ValueError("This model was not prepared for several processes: call engine.prepare(model) first.")
        self._ran = True
        found: Losses = self._root(loss, batch)
        return found

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a number over all processes."""
        summed = value.detach().clone().to(self.device)
        dist.all_reduce(summed)
        return summed.to(value.device)

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, by rank; plain values only."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def in_step(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """As of `Engine`."""
        left, batch = iter(batches), None
        for number in itertools.count():
            new = next(left, None)
            having = self.gather(new is not None)
            if not any(having):
                return
            if number == 0 and not all(having):
                without = [str(rank) for rank, has in enumerate(having) if not has]
                raise ValueError(
                    f"Of {self.world_size} processes, {', '.join(without)} got no batch to validate on: give at least "
                    f"one sample for each, or start fewer processes."
                )
            batch = batch if new is None else new
            yield batch, new is not None

    @contextmanager
    def accumulating(self, model: Any, last: bool) -> Iterator[None]:
        """As of `Engine`.

        Raises:
            RuntimeError: the model was run without `losses`, so that its gradients are those of this process alone.
        """
        self._ran = False
        with self._syncing(last):
            yield
        if not self._ran:
            raise RuntimeError("The losses did not come from engine.losses(model, loss, batch): gradients disagree.")

    def _syncing(self, last: bool) -> AbstractContextManager[Any]:
        raise TypeError(f"{type(self).__name__} must define _syncing(last).")

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """The model with whole weights on the first process, to save it there; None on the others. All enter it."""
        yield model if self.rank == 0 else None
        dist.barrier()

    def save_state(
        self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any],
        averages: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """As of `Engine`, to a folder."""
        save_folder(path, model, optimizer, extra, averages, self.rank, self.world_size)

    def load_state(
        self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer,
        averages: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """As of `Engine`; the extra is the first process's if there were more or fewer then.

        Raises:
            ValueError: no such state, or averages are asked for and it has none.
        """
        if Path(path).is_file():
            return load_file(path, model, optimizer, averages)
        return load_folder(path, model, optimizer, averages, self.rank, self.world_size)

    def close(self) -> None:
        """Leave the group of processes; an engine that nobody closed does it when the interpreter is about to end.

        A thread of gloo lets go of the tensors of the last exchange after the exchange is done, and needs the
        interpreter for it: where that has ended, the process aborts. The threads are joined with the last reference to
        their group, so whatever keeps one is emptied first. A reference of somebody else's is waited for instead.
        """
        atexit.unregister(self.close)
        self._model = self._root = None
        if self._owns_group and dist.is_initialized():
            groups = _let_go_of_groups()
            gc.collect()
            dist.destroy_process_group()
            if any(group() is not None for group in groups):
                time.sleep(_LETTING_GO)


def _let_go_of_groups() -> list[weakref.ref[Any]]:
    """Take the groups out of what FSDP2 and device meshes keep of them; they are of no use after this."""
    groups: list[weakref.ref[Any]] = [weakref.ref(dist.group.WORLD)]
    for keeper in gc.get_objects():
        if str(type(keeper).__module__).startswith(("torch.distributed.fsdp", "torch.distributed.device_mesh")):
            for name, value in list(getattr(keeper, "__dict__", {}).items()):
                if isinstance(value, dist.ProcessGroup):
                    groups.append(weakref.ref(value))
                    setattr(keeper, name, None)
                elif isinstance(value, dict) and all(isinstance(each, dist.ProcessGroup) for each in value.values()):
                    groups += [weakref.ref(each) for each in value.values()]
                    value.clear()
    return groups


def save_folder(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any],
    averages: Mapping[str, torch.Tensor] | None = None, rank: int = 0, world_size: int = 1,
) -> None:
    """Write a training state to a folder, whole or not at all; every process calls it, with its own `extra`."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    if rank == 0:
        remove(partial)
        partial.mkdir(parents=True)
    _wait()
    with _alone_is_fine():
        save(_tensors(model, optimizer, averages), storage_writer=FileSystemWriter(partial))
    atomic_save({"world_size": world_size, "averages": averages is not None, "extra": extra}, _extra(partial, rank))
    _wait()
    if rank == 0:
        put_in_place(partial, target)
    _wait()


def load_file(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer,
    averages: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Read the state that one process wrote to a file, in any number of processes; returns the extra.

    Raises:
        ValueError: averages are asked for and it has none.
    """
    extra: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    stored, steps, means = extra.pop("model"), extra.pop("optimizer")["state"], extra.pop("averages", None)
    if averages is not None and (means is None or set(means) != set(averages)):
        raise ValueError(f"{path} has no averages of these weights: it was written without `ema`.")
    own = model.state_dict()
    model.load_state_dict({name: _shared_out(value, own.get(name)) for name, value in stored.items()})
    optimizer.state.clear()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in steps.items():
        parameter = trained[index]
        optimizer.state[parameter] = {name: _shared_out(value, parameter) for name, value in values.items()}
    for name, value in (averages or {}).items():
        value.copy_(_shared_out(means[name], value))
    return extra


def _shared_out(value: torch.Tensor, like: Any) -> torch.Tensor:
    """A whole tensor as a tensor of its shape is laid out over the processes, with storage of its own."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, torch.Tensor) or like.shape != value.shape:
        return value.clone()
    if isinstance(like, DTensor):
        value = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    made: torch.Tensor = torch.empty_like(like.detach(), dtype=value.dtype).copy_(value)
    return made


def load_folder(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer,
    averages: Mapping[str, torch.Tensor] | None = None, rank: int = 0, world_size: int = 1,
) -> dict[str, Any]:
    """Read what `save_folder` wrote, in any number of processes; returns the extra.

    Raises:
        ValueError: no such folder, or averages are asked for and it has none.
    """
    from torch.distributed.checkpoint import FileSystemReader, load

    folder = Path(path)
    if not _extra(folder, 0).is_file():
        raise ValueError(f"{folder} is no training state of several processes: {_extra(folder, 0).name} is missing.")
    kept = torch.load(_extra(folder, 0), weights_only=True)
    if kept["world_size"] == world_size:
        kept = torch.load(_extra(folder, rank), weights_only=True)
    if averages is not None and not kept["averages"]:
        raise ValueError(f"{folder} has no averages of these weights: it was written without `ema`.")
    reader = FileSystemReader(folder)
    _make_state(model, optimizer, reader.read_metadata().state_dict_metadata)
    with _alone_is_fine():
        load(_tensors(model, optimizer, averages), storage_reader=reader)
    extra: dict[str, Any] = kept["extra"]
    return extra


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: Mapping[str, torch.Tensor] | None
) -> dict[str, Any]:
    """All tensors of a run by name, which are read in place. Options of the optimiser are the configuration's."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    return {**found, **{f"averages.{name}": value for name, value in (averages or {}).items()}}


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Make the optimiser's tensors that a state has; what never got a gradient has none."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for path, kind in stored.items():
        part, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        if part == "optimizer" and name in parameters:
            like, dtype = parameters[name].detach(), kind.properties.dtype
            same = kind.size == like.shape
            value = torch.zeros_like(like, dtype=dtype) if same else torch.zeros(kind.size, dtype=dtype)
            optimizer.state[parameters[name]][key] = value


def _extra(folder: Path, rank: int) -> Path:
    return folder / f"extra.{rank}.pt"


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


class Replicated(ParallelEngine):
    """DistributedDataParallel: every process holds the whole model; what no process used gets no gradient."""

    def prepare(self, model: nn.Module) -> Any:
        """The model itself, with the weights of the first process. Set `requires_grad` before."""
        model.to(self.device)
        self._model = model
        root = _Called(model)
        # Commonly unused: where all weights are used, DDP advises on standard error not to look for unused ones.
        root.spare = nn.Parameter(torch.zeros(1, device=self.device))
        self._root = nn.parallel.DistributedDataParallel(root, find_unused_parameters=True)
        return model

    def _syncing(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._root.no_sync()


class Sharded(ParallelEngine):
    """FSDP2: every process holds a share of each weight; a layer's are gathered, mixins included, while it runs.

    Layers of nested towers are sharded likewise, and run on every process: a blank picture stands in where a batch
    has none. Weights that one process did not use count as zero gradients; what no process used gets none.

    Args:
        replicas: how many groups of processes hold all weights each (HSDP).
        minutes: as of `ParallelEngine`.

    Raises:
        ValueError: the number of processes is no multiple of `replicas`, or torch is too old.
    """

    def __init__(self, replicas: int = 1, minutes: float = 30) -> None:
        from torch.distributed.fsdp import FSDPModule

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ValueError(
                f"engine 'fsdp' needs torch 2.13 or later, and this is {torch.__version__}: its FSDP2 hangs where one "
                f"process did not use a weight that another did. Update torch, or choose ddp."
            )
        super().__init__(minutes)
        if replicas < 1 or self.world_size % replicas:
            raise ValueError(f"{self.world_size} processes do not divide into {replicas} replicas.")
        self.replicas = replicas
        self._mesh: Any = None
        self._used: set[str] = set()
        self._encoders: dict[str, Any] = {}

    def prepare(self, model: Any) -> Any:
        """The model itself, sharded in place; its parameters are new. Set `requires_grad` before.

        Raises:
            ValueError: trainable parameters of several dtypes in one layer, or some that came after sharding.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        layers = {name: module for name, module in reversed(list(model.named_modules())) if isinstance(module, Layer)}
        _check_dtypes(model, list(layers))
        if self._model is model:
            plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
            if plain:
                raise ValueError(f"{plain[0]} was added after the model was sharded. Add all mixins before training.")
        else:
            if self._mesh is None:
                one = self.replicas == 1
                shape = (self.world_size,) if one else (self.replicas, self.world_size // self.replicas)
                self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard")[one:])
            mesh = self._mesh
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, 0)
            for layer in layers.values():
                fully_shard(layer, mesh=mesh)
                layer.register_forward_pre_hook(_feel_gradients, prepend=True)
            self._root = fully_shard(_Called(model), mesh=mesh)
            self._root.set_reduce_scatter_unused_params(True)
            self._model = model
        self._encoders = {
            f"mixins.{name}.": mixin for name, mixin in model.mixins.items() if hasattr(mixin, "synchronised")
        }
        for prefix, mixin in self._encoders.items():
            mixin.synchronised = any(name.startswith(prefix) for name in layers)
        for module in (self._root, *layers.values()):
            self._watch(model, module)
        return model

    def _watch(self, model: Any, module: nn.Module) -> None:
        """Note which of a module's weights get gradients, from its first run on: only then are they gathered."""
        from torch.distributed.tensor import DTensor

        def watch(module: nn.Module, inputs: Any) -> None:
            if torch.is_grad_enabled():
                handle.remove()
                own = {id(parameter) for parameter in module.parameters()}
                for name, parameter in model.named_parameters():
                    gathered = id(parameter) in own and not isinstance(parameter, DTensor)
                    if gathered and parameter.requires_grad and not hasattr(parameter, "watched"):
                        parameter.watched = True
                        parameter.register_post_accumulate_grad_hook(partial(self._note, name))

        handle = module.register_forward_pre_hook(watch)

    def _note(self, name: str, parameter: torch.Tensor) -> None:
        encoder = next((mixin for prefix, mixin in self._encoders.items() if name.startswith(prefix)), None)
        if encoder is None or not encoder.synchronised or encoder.encoded:
            self._used.add(name)

    def losses(self, model: Any, loss: Loss, batch: Any) -> Losses:
        """As of `ParallelEngine`."""
        found = super().losses(model, loss, batch)
        if not torch.is_grad_enabled():
            self._root.reshard()
        return found

    @contextmanager
    def _syncing(self, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        for encoder in self._encoders.values():
            encoder.encoded = False
        yield
        if not last:
            return
        trained = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        used = torch.tensor([name in self._used for name, _ in trained], dtype=torch.int32, device=self.device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        self._used.clear()
        for (_, parameter), was_used in zip(trained, used.tolist(), strict=True):
            if not was_used:
                parameter.grad = None

    def clip(self, parameters: Iterable[torch.Tensor], largest: float) -> torch.Tensor:
        """As of `Engine`; the norm is that of the whole weights."""
        chosen = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in chosen if parameter.grad is not None]
        norm = _full(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(chosen, largest, norm)
        return norm

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """As of `ParallelEngine`; weights are gathered one by one, to the CPU of the first process."""
        from torch.distributed.tensor import DTensor

        kept: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []
        gathered: dict[int, nn.Parameter] = {}
        for module in model.modules():
            weights = {}
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor) and id(parameter) not in gathered:
                    full = _full(parameter.detach())
                    if self.rank == 0:
                        gathered[id(parameter)] = nn.Parameter(full.cpu(), parameter.requires_grad)
                weights[name] = gathered.get(id(parameter), parameter)
            if self.rank == 0:
                kept.append((module, type(module), dict(module._parameters), dict(module._buffers)))
                module._parameters.update(weights)
                module.__class__ = Layer if isinstance(module, Layer) else type(module)
        try:
            yield model if self.rank == 0 else None
        finally:
            for module, kind, weights, buffers in kept:
                module.__class__ = kind
                module._parameters.update(weights)
                module._buffers.update(buffers)
        dist.barrier()


def _feel_gradients(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Run the backward of a layer with trained weights on every process, also where a batch used none of them.

    Its weights are gathered for that, and all processes have to gather the same.
    """
    hidden_states, *others = inputs
    needed = torch.is_grad_enabled() and not hidden_states.requires_grad
    if needed and any(parameter.requires_grad for parameter in layer.parameters()):
        return hidden_states.detach().requires_grad_(), *others
    return None


def _full(value: Any) -> torch.Tensor:
    full: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def _check_dtypes(model: nn.Module, layers: list[str]) -> None:
    """FSDP2 reduces the gradients of a layer as one: its trainable weights need one dtype.

    Raises:
        ValueError: they have several.
    """
    first: dict[str, tuple[str, torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
            other, dtype = first.setdefault(group, (name, parameter.dtype))
            if dtype != parameter.dtype:
                where = f"layer {group}" if group else "what lies outside of the layers"
                raise ValueError(
                    f"FSDP2 needs one dtype for the trainable weights of {where}: {other} is {dtype}, {name} is "
                    f"{parameter.dtype}. Give them one dtype, or freeze those of the other."
                )
