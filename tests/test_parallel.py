"""Several processes train as one does: real processes on gloo, compared with a single one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from mixformer import BaseModel, from_pretrained, save_pretrained
from mixformer.objectives import LanguageObjective
from mixformer.testing import collate, jitter, sample_row, tiny_model
from mixformer.train.engine import Engine
from mixformer.train.parallel import engine_of, load_folder, save_folder

ROOT = Path(__file__).parents[1]
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
    other = engine.prepare(small_model())
    optimizer = make_optimizer(other)
    engine.load_state(folder / "from-one", other, optimizer)
    return {"extra": extra, "resumed": resumed, "from_one": take_steps(engine, other, optimizer, steps[2:])}


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


def process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
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
    torch.save(found, folder / f"found.{rank}.pt")
    for engine in engines.values():
        engine.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left; they end with exit code 0, or `spawn` raises."""
    folder = tmp_path_factory.mktemp("parallel")
    model = small_model()
    optimizer = make_optimizer(model)
    take_steps(Engine(), model, optimizer, global_batches(model)[:2])
    save_folder(folder / "from-one", model, optimizer, {"step": 2})
    mp.spawn(process, args=(free_port(), folder), nprocs=WORLD_SIZE)
    return folder


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


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_state_of_one_process_is_resumed_by_two(name: str, found: Any, alone: Any) -> None:
    for process in found:
        torch.testing.assert_close(process[f"{name}-state"]["from_one"], alone[0][2:], atol=1e-6, rtol=0)


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


ABRUPT = """
import torch
from mixformer.testing import sample_row, tiny_model
from mixformer.train.parallel import engine_of
torch.set_num_threads(1)
engine = engine_of("fsdp", minutes=3)
model = engine.prepare(tiny_model("cogvlm"))
loss = lambda model, batch: {"loss": model.run(**batch).logits.square().mean()}
for step in range(3):
    with engine.accumulating(model, last=True):
        engine.losses(model, loss, sample_row(model, 1))["loss"].backward()
"""


def test_processes_end_with_code_0_though_the_last_exchange_was_just_made_and_nothing_is_closed() -> None:
    trials = []
    for _ in range(2):
        port = str(free_port())
        for rank in range(WORLD_SIZE):
            place = {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
            trials.append(subprocess.Popen([sys.executable, "-c", ABRUPT], cwd=ROOT, env=environment))
    try:
        assert [trial.wait(timeout=180) for trial in trials] == [0] * len(trials)
    finally:
        for trial in trials:
            trial.kill()
            trial.wait()


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
