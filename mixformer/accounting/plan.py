"""What fits into a given memory, and what would make the rest fit, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from mixformer.accounting.changes import (
    OF_ACTIVATIONS,
    Change,
    Setup,
    bits_4,
    bits_8,
    checkpointing,
    chunked_loss,
    config_of,
    half_context,
    lora,
    one_row,
    smaller_dtype,
    twice_the_devices,
    variant_of,
    workload_of,
)
from mixformer.accounting.memory import (
    MemoryUse,
    Reading,
    inference_memory,
    is_sharded,
    loading_memory,
    training_memory,
)
from mixformer.accounting.parameters import part_sizes, total_size
from mixformer.accounting.peaks import answering_peaks, training_peaks, training_twin
from mixformer.accounting.quantised_shapes import chosen_kinds, kinds_of, unquantised
from mixformer.accounting.workload import meta_twin
from mixformer.quantised import Kind

LOADING, INFERENCE, TRAINING = "loading", "inference", "training"


@dataclass(frozen=True)
class Remedy:
    """A change, made together with those before it in its list.

    Attributes:
        change: what to do.
        setting: how, as a configuration or the command line says it.
        total: bytes that are needed then.
        fits: whether they are there.
    """

    change: str
    setting: str
    total: int
    fits: bool


@dataclass(frozen=True)
class Purpose:
    """What one use of the model needs of one device.

    Attributes:
        name: `loading`, `inference`, or `training` with the stage's name.
        setup: how it is used.
        use: what it needs.
        fits: whether that is there; None where no memory was given.
        remedies: ways to make it fit, each a list of changes that are made one after the other.
        problem: why a stage could not be planned; its use is empty then.
    """

    name: str
    setup: Setup
    use: MemoryUse
    fits: bool | None = None
    remedies: list[list[Remedy]] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a model needs.

    Attributes:
        model: its class.
        parameters: how many it has.
        dtype: of most of its weights.
        memory: bytes of each device, if given.
        purposes: what it may be used for.
    """

    model: str
    parameters: int
    dtype: str
    memory: int | None
    purposes: list[Purpose]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for programs."""
        found = dataclasses.asdict(self)
        for made, purpose in zip(found["purposes"], self.purposes, strict=True):
            made["use"] = {"total": purpose.use.total, **purpose.use.parts}
        return found


@dataclass(frozen=True)
class PlannedStage:
    """A stage of training.

    Attributes:
        name: of it; empty where a configuration has none.
        config: options of the loop (`TrainConfig`).
        batch, context: sizes that its task says; None where it says none.
    """

    name: str
    config: Any
    batch: int | None = None
    context: int | None = None


def make_plan(
    model: Any, setup: Setup, memory: int | None = None, stages: Sequence[PlannedStage] = (), engine: str = "auto",
    reading: Reading | None = None,
) -> Plan:
    """What loading, answering and training need, and what would make it fit.

    Args:
        model: on the meta device, of the dtypes that it is loaded in; it is left alone.
        setup: how it is used.
        memory: bytes of each device; None not to judge.
        stages: of training; none for one that trains everything with the loop's defaults.
        engine: `fsdp`, `ddp` or `auto`, for several devices.
        reading: as of `loading_memory`.

    Raises:
        ValueError: sizes that the model does not take, or the only stage cannot be planned.
    """
    with tqdm(desc="Forwards and backwards without memory", unit="", leave=False, disable=None) as bar:
        planner = _Planner(model, engine, reading or Reading(), bar)
        purposes = [planner.purpose(LOADING, setup, memory), planner.purpose(INFERENCE, setup, memory)]
        for stage in stages or _default_stages():
            name = f"{TRAINING} ({stage.name})" if stage.name else TRAINING
            used = replace(setup, batch=stage.batch or setup.batch, context=stage.context or setup.context)
            try:
                purposes.append(planner.purpose(name, used, memory, stage.config))
            except ValueError as error:  # it may train what its task alone brings; loading and answering are known
                if len(stages) == 1:
                    raise
                purposes.append(Purpose(name, used, MemoryUse(), problem=str(error)))
    size = total_size(part_sizes(model).values())
    most = max(size.bytes, key=lambda dtype: size.bytes[dtype])
    return Plan(type(model).__name__, size.parameters, most, memory, purposes)


def _default_stages() -> list[PlannedStage]:
    from mixformer.train import TrainConfig

    return [PlannedStage("", TrainConfig())]


class _Planner:
    """Estimates of one model; what is run on the meta device is run once."""

    def __init__(self, model: Any, engine: str, reading: Reading, bar: Any) -> None:
        self.stored = kinds_of(model)
        self.model = unquantised(meta_twin(model)) if self.stored else model
        self.engine, self.reading, self.bar = engine, reading, bar
        self._known: dict[Any, Any] = {}

    def purpose(self, name: str, setup: Setup, memory: int | None, config: Any = None) -> Purpose:
        """What a use of the model needs, and what would make it fit."""
        use = self.use(name, setup, config)
        if memory is None:
            return Purpose(name, setup, use)
        fits = use.total <= memory
        return Purpose(name, setup, use, fits, [] if fits else self._remedies(name, setup, memory, config))

    def use(self, name: str, setup: Setup, config: Any) -> MemoryUse:
        """What a use of the model needs of one device."""
        kinds = self._kinds(setup)
        if name == LOADING:
            sizes = self.reading.sizes or {name: p.nbytes for name, p in self.model.named_parameters()}
            reading = replace(self.reading, copied=self.reading.copied or setup.dtype is not None, sizes=sizes)
            return loading_memory(variant_of(self.model, setup), kinds, reading)
        key = name, replace(setup, quantise=None, devices=1)
        if key not in self._known:
            self._known[key] = self._run(name, setup, config)
        model, peaks = self._known[key]
        rows = setup.batch * setup.context
        if name == INFERENCE:
            return inference_memory(model, peaks, kinds, rows)
        return training_memory(model, peaks, setup.devices, is_sharded(self.model, self.engine), kinds, rows)

    def _kinds(self, setup: Setup) -> dict[str, Kind]:
        return self.stored or (chosen_kinds(self.model, setup.quantise) if setup.quantise else {})

    def _run(self, name: str, setup: Setup, config: Any) -> tuple[Any, Any]:
        self.bar.update()
        model = variant_of(self.model, setup)
        workload = workload_of(model, setup)
        config = config_of(config, setup) if name != INFERENCE else None
        twin = model if config is None else training_twin(model, config)
        held = [path for path in self.stored if config is not None and twin.get_submodule(path).weight.requires_grad]
        if held:
            raise ValueError(
                f"{len(held)} quantised weights, such as '{held[0]}', would be trained, and cannot be. Train a LoRA on "
                f"them: --lora 8."
            )
        try:
            if config is None:
                return twin, answering_peaks(twin, workload)
            return twin, training_peaks(twin, config, workload)
        except RuntimeError as error:
            raise ValueError(
                f"{name}: the model does not run on the meta device: {error}. Parts of several dtypes need `autocast` "
                f"in training, and one `dtype` otherwise."
            ) from error

    def _remedies(self, name: str, setup: Setup, memory: int, config: Any) -> list[list[Remedy]]:
        def follow(setup: Setup, changes: Sequence[Change]) -> tuple[list[Remedy], Setup]:
            made: list[Remedy] = []
            use = self.use(name, setup, config)
            for change in changes:
                if use.total <= memory:
                    break
                of_activations = change in OF_ACTIVATIONS and use.parts.get("activations", 0) < use.total // 10
                found = None if of_activations else change(self.model, setup, config)
                then = None if found is None else self.use(name, found[2], config)
                if found is None or then is None or then.total > 0.99 * use.total:
                    continue
                text, setting, setup = found
                use = then
                made.append(Remedy(text, setting, use.total, use.total <= memory))
            return made, setup

        quantised = [smaller_dtype] if self.stored else [smaller_dtype, bits_8, bits_4]
        shorter = [half_context] * 6
        if name == LOADING:
            return [way for way in [follow(setup, quantised)[0]] if way]
        if name == INFERENCE:
            return [way for way in [follow(setup, [smaller_dtype, one_row, *quantised[1:], *shorter])[0]] if way]
        saving: list[Change] = [chunked_loss, checkpointing, one_row]
        saved, after = follow(setup, saving)
        if saved and saved[-1].fits:
            return [saved]
        ways: list[list[Change]] = [[lora, *saving, *quantised, *shorter]]
        if is_sharded(self.model, self.engine):
            ways.append([twice_the_devices, *saving, *[twice_the_devices] * 9])
        found = [saved + follow(after, way)[0] for way in ways]
        return [way for way in found if way]
