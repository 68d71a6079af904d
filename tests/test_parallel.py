"""Several processes train as one does: real processes on gloo, compared with a single one."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mixformer import BaseModel, from_pretrained, save_pretrained
from mixformer.objectives import LanguageObjective
from mixformer.testing import collate, jitter, sample_row, tiny_model
from mixformer.train.engine import Engine
from mixformer.train.parallel import engine_of, load_folder, save_folder

WORLD_SIZE = 2
CLIP = 0.05  # smaller than any norm here
PICTURES = [  # of each batch: steps, then processes, then accumulation
    [(1, 2), (0, 0)],
    [(0, 0), (0, 1)],
    [(0, 0), (0, 0)],
    [(0, 1), (1, 0)],
]
objective = LanguageObjective()
Batch = dict[str, Any]


def small_model(**changes: Any) -> BaseModel:
    """Pictures in the sequence and beside it, experts, layers that never run, and frozen weights."""
    model = tiny_model("cogagent", **changes)
    jitter(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("word_embeddings" not in name and "attention.dense" not in name)
    return model.train()


def global_batches(model: BaseModel) -> list[list[list[Batch]]]:
    """Batches by step and process; each has another number of labels."""
    generator, steps = torch.Generator().manual_seed(5), []
    for step, processes in enumerate(PICTURES):
        ranks = []
        for rank, counts in enumerate(processes):
            batches = []
            for place, count in enumerate(counts):
                rows = [sample_row(model, count, 9 + 2 * rank, generator), sample_row(model, 0, 7 + step, generator)]
                batch = collate(rows)
                ignored = batch["attention_mask"] == 0
                if "token_type_ids" in batch:
                    ignored = ignored | (batch["token_type_ids"] == 1)
                ignored[:, -1 - 3 * rank - place :] = True
                batches.append({**batch, "labels": batch["input_ids"].masked_fill(ignored, -100)})
            ranks.append(batches)
        steps.append(ranks)
    return steps


def make_optimizer(model: BaseModel) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)


def take_steps(
    engine: Any, model: BaseModel, optimizer: torch.optim.Optimizer, steps: list[list[list[Batch]]]
) -> list[float]:
    """A loop of the barest kind; the loss of every step."""
    losses = []
    for ranks in steps:
        batches = ranks[engine.rank] if engine.world_size > 1 else [batch for own in ranks for batch in own]
        counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
        total = engine.total(torch.stack(counts).sum())
        value = torch.zeros(())
        for index, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            with engine.accumulating(model, last=index == len(batches) - 1):
                loss = engine.losses(model, objective, batch)["language"] * count / total
                (loss * engine.gradient_scale).backward()
            value += loss.detach()
        engine.clip([p for group in optimizer.param_groups for p in group["params"]], CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(engine.total(value)))
    return losses


def trained_alone(**changes: Any) -> tuple[list[float], BaseModel]:
    model = small_model(**changes)
    engine = Engine()
    model = engine.prepare(model)
    return take_steps(engine, model, make_optimizer(model), global_batches(model)), model


# ------------------------------------------------------------------------------------- what the processes do


def train_all(engine: Any, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    model = engine.prepare(small_model(**changes))
    losses = take_steps(engine, model, make_optimizer(model), global_batches(model))
    with engine.whole(model) as whole:
        if whole is not None:
            save_pretrained(whole, folder / f"{name}-weights")
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {"losses": losses, "sharded": sharded}


def save_and_load(engine: Any, folder: Path, name: str) -> dict[str, Any]:
    model = engine.prepare(small_model())
    optimizer, steps = make_optimizer(model), global_batches(model)
    take_steps(engine, model, optimizer, steps[:2])
    engine.save_state(folder / name, model, optimizer, {"step": 2, "rank": engine.rank})
    take_steps(engine, model, optimizer, steps[2:3])
    engine.save_state(folder / f"{name}-twice", model, optimizer, {"step": 1})
    engine.save_state(folder / f"{name}-twice", model, optimizer, {"step": 3})
    again = engine.prepare(small_model())
    optimizer = make_optimizer(again)
    extra = engine.load_state(folder / name, again, optimizer)
    resumed = take_steps(engine, again, optimizer, steps[2:])
    found = {"extra": extra, "resumed": resumed}
    for kind in ("from-one", "from-one.pt"):
        other = engine.prepare(small_model())
        optimizer = make_optimizer(other)
        averages = {name: torch.zeros_like(p.detach()) for name, p in other.named_parameters() if p.requires_grad}
        assert engine.load_state(folder / kind, other, optimizer, averages) == {"step": 2}
        whole = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in averages.items()}
        found[kind] = {"losses": take_steps(engine, other, optimizer, steps[2:]), "averages": whole}
    return found


def watch_shards(engine: Any) -> dict[str, Any]:
    """Which weights of the two layers are whole, mixins' included, while the second runs."""
    model = engine.prepare(small_model())
    seen: dict[str, list[bool]] = {}

    def look(module: torch.nn.Module, inputs: Any) -> None:
        for index, layer in enumerate(model.transformer.layers):
            seen[str(index)] = [not isinstance(parameter, DTensor) for parameter in layer.parameters()]

    model.transformer.layers[1].register_forward_pre_hook(look)
    batch = global_batches(model)[0][0][0]
    with torch.no_grad():
        engine.losses(model, objective, batch)
    after = [not isinstance(parameter, DTensor) for parameter in model.parameters()]
    tower: Any = model.get_mixin("image").tower
    shares = [p.to_local().numel() / p.numel() for p in tower.transformer.layers[0].parameters() if len(p) % 2 == 0]
    return {**seen, "after": after, "shares": shares}


def dtype_message(engine: Any) -> str:
    model = small_model()
    model.transformer.layers[1].mixins["vision_expert"].to(torch.bfloat16)
    try:
        engine.prepare(model)
    except ValueError as error:
        return str(error)
    return ""


def process(folder: Path) -> None:
    found: dict[str, Any] = {}
    engines: dict[str, Any] = {"ddp": engine_of("auto", minutes=2), "fsdp": engine_of("fsdp", minutes=2)}
    found["kinds"] = [type(engine).__name__ for engine in engines.values()]
    engines["hsdp"] = engine_of("fsdp", replicas=2, minutes=2)
    for name, engine in engines.items():
        found[name] = train_all(engine, folder, name)
    found["recomputed"] = train_all(engines["fsdp"], folder, "recomputed", checkpoint_activations=True)
    for name in ("ddp", "fsdp"):
        found[f"{name}-state"] = save_and_load(engines[name], folder, f"{name}-state")
    found["shards"] = watch_shards(engines["fsdp"])
    found["dtypes"] = dtype_message(engines["fsdp"])
    torch.save(found, folder / f"found.{engines['ddp'].rank}.pt")
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, which ended with exit code 0."""
    folder = tmp_path_factory.mktemp("parallel")
    model = small_model()
    optimizer = make_optimizer(model)
    take_steps(Engine(), model, optimizer, global_batches(model)[:2])
    save_folder(folder / "from-one", model, optimizer, {"step": 2}, averages_of(model))
    Engine().save_state(folder / "from-one.pt", model, optimizer, {"step": 2}, averages_of(model))
    forks.shared().run("test_parallel.process", folder, world_size=WORLD_SIZE)
    return folder


def averages_of(model: BaseModel) -> dict[str, torch.Tensor]:
    """Something that is laid out as the trained weights, and is not them."""
    return {name: 2 * p.detach() + 1 for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found.{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], BaseModel]:
    return trained_alone()


# ------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", "recomputed"])
def test_two_processes_give_the_losses_of_one(name: str, found: Any, alone: Any) -> None:
    for process in found:
        torch.testing.assert_close(process[name]["losses"], alone[0], atol=1e-6, rtol=0)
        assert process[name]["sharded"] == (name != "ddp")


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", "recomputed"])
def test_weights_saved_from_two_processes_are_those_of_one(name: str, folder: Path, alone: Any) -> None:
    saved = from_pretrained(folder / f"{name}-weights").state_dict()
    torch.testing.assert_close(saved, alone[1].state_dict(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_state_of_two_processes_is_resumed_by_two_and_by_one(
    name: str, found: Any, folder: Path, alone: Any
) -> None:
    for rank, process in enumerate(found):
        assert process[f"{name}-state"]["extra"] == {"step": 2, "rank": rank}
        torch.testing.assert_close(process[f"{name}-state"]["resumed"], process[name]["losses"][2:], atol=0, rtol=0)
    model = small_model()
    jitter(model, seed=7)
    optimizer = make_optimizer(model)
    assert load_folder(folder / f"{name}-state", model, optimizer) == {"step": 2, "rank": 0}
    losses = take_steps(Engine(), model, optimizer, global_batches(model)[2:])
    torch.testing.assert_close(losses, alone[0][2:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["from-one", "from-one.pt"], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_state_of_one_process_is_resumed_by_two(name: str, kind: str, found: Any, alone: Any, folder: Path) -> None:
    averages = torch.load(folder / "from-one.pt", weights_only=True)["averages"]
    for process in found:
        resumed = process[f"{name}-state"][kind]
        torch.testing.assert_close(resumed["losses"], alone[0][2:], atol=1e-6, rtol=0)
        torch.testing.assert_close(resumed["averages"], averages, atol=0, rtol=0)


def test_a_state_that_is_written_again_is_replaced(folder: Path) -> None:
    model = small_model()
    assert load_folder(folder / "fsdp-state-twice", model, make_optimizer(model)) == {"step": 3}
    assert not list(folder.glob("*.partial"))


def test_a_layer_is_sharded_again_while_the_next_runs_and_its_mixins_with_it(found: Any) -> None:
    for process in found:
        shards = process["shards"]
        assert not any(shards["0"]) and all(shards["1"])
        assert len(shards["0"]) == len(list(small_model().transformer.layers[0].parameters()))
        assert not any(shards["after"])
        assert set(shards["shares"]) == {0.5}


def test_trainable_weights_of_two_dtypes_in_a_layer_are_refused_by_name(found: Any) -> None:
    for process in found:
        assert "layer transformer.layers.1:" in process["dtypes"]
        assert "mixins.vision_expert." in process["dtypes"] and "torch.bfloat16" in process["dtypes"]


def test_auto_takes_ddp_for_small_models(found: Any) -> None:
    assert found[0]["kinds"] == ["Replicated", "Sharded"]


class Slow(torch.Tensor):
    """Whoever lets go of it last takes its time, holding on to the interpreter's end."""

    def __del__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(1)
            print("let go")


def end_abruptly(folder: Path, kind: str, slowly: bool) -> None:
    """Exchange something last, and close nothing."""
    engine = engine_of(kind, minutes=3)
    model = engine.prepare(small_model())
    batch = global_batches(model)[0][engine.rank][0]
    with engine.accumulating(model, last=True):
        engine.losses(model, objective, batch)["language"].backward()
    if slowly:
        time.sleep(0.3 * engine.rank)  # the thread of the first has begun and waits when nobody else has the tensor
        dist.all_reduce(torch.ones(3).as_subclass(Slow), async_op=True)
        time.sleep(0.5)
    engine.losses(model, objective, batch)["language"].backward()
    globals()["kept"] = model, engine


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_end_with_code_0_when_nothing_is_closed_after_the_last_exchange(kind: str, tmp_path: Path) -> None:
    running = forks.shared()
    groups = [running.start("test_parallel.end_abruptly", tmp_path / str(n), kind, False) for n in range(3)]
    assert [group.wait() for group in groups] == [[0, 0]] * len(groups)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_interpreter_waits_for_threads_that_let_go_of_tensors(kind: str, tmp_path: Path) -> None:
    group = forks.shared().start("test_parallel.end_abruptly", tmp_path, kind, True)
    assert group.wait() == [0, 0]
    assert "let go" in group.output(0) + group.output(1)


def end_with_an_error(folder: Path, kind: str) -> None:
    """The second process meets an error in the middle of a step."""
    engine = engine_of(kind, minutes=3)
    model = engine.prepare(small_model())
    for number, batch in enumerate(global_batches(model)[0][engine.rank]):
        if (engine.rank, number) == (1, 1):
            raise ValueError("no such row")
        with engine.accumulating(model, last=number == 1):
            engine.losses(model, objective, batch)["language"].backward()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_error_of_one_process_ends_the_others(kind: str, tmp_path: Path) -> None:
    start = time.monotonic()
    group = forks.shared().start("test_parallel.end_with_an_error", tmp_path, kind)
    assert group.wait() == [1, 1] and time.monotonic() - start < 60
    assert "ValueError: no such row" in group.output(1)


def close_and_count(folder: Path, kind: str, replicas: int) -> None:
    """Train, close, and count the threads that are left of the group."""
    engine = engine_of(kind, None, replicas, minutes=3)
    models = [engine.prepare(small_model()) for _ in range(2)]
    engine.losses(models[1], objective, global_batches(models[1])[0][engine.rank][0])["language"].backward()
    assert count_threads() > 0
    engine.close()
    assert count_threads() == 0
    assert not any(group for group in (dist.group.WORLD,))


def count_threads() -> int:
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("pt_gloo") for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "replicas"), [("ddp", 1), ("fsdp", 1), ("fsdp", 2)])
def test_closing_joins_the_threads_of_the_group_though_models_live_on(
    kind: str, replicas: int, tmp_path: Path
) -> None:
    forks.shared().run("test_parallel.close_and_count", tmp_path, kind, replicas)


def test_fsdp_says_which_torch_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(ValueError, match=r"needs torch 2\.13 or later.*choose ddp"):
        engine_of("fsdp")
    assert not dist.is_initialized()


def test_an_engine_that_does_not_fit_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert type(engine_of("auto")) is Engine and type(engine_of("single")) is Engine
    with pytest.raises(ValueError, match="torchrun"):
        engine_of("ddp")
    with pytest.raises(ValueError, match="choose one of auto, single, ddp, fsdp"):
        engine_of("deepspeed")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="'single' is for one process, but 2 were started"):
        engine_of("single")
