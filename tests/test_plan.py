"""Plans of memory: against measured peaks, against arithmetic of their own, and what they advise."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mixformer import BaseModel, from_pretrained, save_pretrained
from mixformer.accounting.changes import Setup, default_context, workload_of
from mixformer.accounting.live_memory import LiveBytes
from mixformer.accounting.memory import Reading, inference_memory, loading_memory, training_memory, weight_bytes
from mixformer.accounting.peaks import TrainingPeaks, answering_peaks, training_peaks, training_twin
from mixformer.accounting.plan import PlannedStage, make_plan
from mixformer.accounting.quantised_shapes import can_quantise, chosen_kinds
from mixformer.accounting.targets import settings_of, shapes_of
from mixformer.accounting.workload import Workload
from mixformer.cli import console
from mixformer.filling import READ_AHEAD
from mixformer.mixins import LoRAMixin
from mixformer.quantised import resolve_hooks, shape_linear
from mixformer.testing import tiny_model
from mixformer.train import Role, TrainConfig, train
from models.cogagent import CogAgent, CogAgentConfig
from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LAYER = 4 * 4096**2 + 3 * 4096 * 11008  # weights of the Linears of a layer of LLaMA-7B
TABLE = 32000 * 4096


# ---------------------------------------------------------------- measured


def medium_model(device: str = "cpu", **changes: Any) -> BaseModel:
    """A CogAgent of 23 million parameters, most of them in tables, so that it takes memory and little time."""
    width = {"hidden_size": 128, "num_heads": 4, "inner_hidden_size": 384}
    config = CogAgentConfig(
        vocab_size=16000, hidden_size=384, num_layers=3, num_heads=6, inner_hidden_size=1024, rope_tables="fp32",
        vision=EVA2CLIPEConfig(num_layers=2, image_size=112, **width),
        cross_vision=EVA2CLIPLConfig(num_layers=2, num_layers_run=1, image_size=224, stored_head_size=0, **width),
        cross_compute_size=192, **changes,
    )  # fmt: skip
    return CogAgent(config, device=device)


def batch_of(model: Any, setup: Setup) -> dict[str, torch.Tensor]:
    """Real inputs of the sizes that a setup means."""
    from mixformer.testing import collate, sample_row

    text = workload_of(model, setup).text_tokens + 1
    batch = collate([sample_row(model, setup.images, text) for _ in range(setup.batch)])
    return {name: value for name, value in batch.items() if name != "attention_mask"}


SETUPS = {
    "inference": Setup(batch=6, context=200),
    "inference in 8 bits": Setup(batch=6, context=200, quantise="int8"),
    "activations": Setup(batch=2, context=200),
    "recomputed": Setup(batch=5, context=200, checkpointing=True, loss_chunk=100),
    "averaged": Setup(batch=1, context=100),
    "low rank": Setup(batch=3, context=200, lora=8),
    "low rank in 8 bits": Setup(batch=3, context=200, lora=8, quantise="int8"),
    "two dtypes": Setup(batch=3, context=200, dtype="bfloat16"),
}
EXPERTS = TrainConfig(steps=2, progress=False, trainable=["vision_expert*"])
LOW_RANK = TrainConfig(steps=2, progress=False, trainable=["planned_lora"])
LOOPS = {
    "activations": EXPERTS, "recomputed": dataclasses.replace(EXPERTS, loss_chunk=100),
    "averaged": TrainConfig(steps=2, progress=False, ema=0.9, frozen=["mixins.*.tower.*"]),
    "low rank": LOW_RANK, "low rank in 8 bits": LOW_RANK,
    "two dtypes": dataclasses.replace(
        EXPERTS, roles=[Role("vision_expert*", dtype="float32")], autocast="bfloat16"
    ),
}  # fmt: skip


def peak(run: Callable[[], Any]) -> int:
    """The most memory that this process holds while it runs, above what it held before."""

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))

    gc.collect()
    before = kilobytes("VmRSS")
    CLEAR.write_text("5")  # begin a new VmHWM
    kept = run()
    del kept
    return 1024 * (kilobytes("VmHWM") - before)


def measure(folder: Path) -> dict[str, int]:
    """Peaks of the real thing; everything is imported and has run once before."""
    from mixformer import generate

    def load(source: Path, setup: Setup) -> Any:
        return from_pretrained(source, dtype=setup.dtype, quantise=setup.quantise)

    def answer(source: Path, setup: Setup) -> Any:
        model = load(source, setup)
        return model, generate(model, batch_of(model, setup), max_new_tokens=1)

    def learn(source: Path, setup: Setup, loop: TrainConfig) -> None:
        model: Any = load(source, setup)
        for inner in [model, *(inner for _, inner in model.nested_models())]:
            inner.config.checkpoint_activations = bool(setup.checkpointing)
        if setup.lora is not None:
            model.add_mixin("planned_lora", LoRAMixin(["language"], rank=setup.lora))
        batch = batch_of(model, setup)
        batch["labels"] = batch["input_ids"]
        train(model, [batch, batch], loop)

    tiny = folder / "tiny"
    save_pretrained(tiny_model("cogagent"), tiny)
    names = [name for name in (*SETUPS, *LOOPS) if can_quantise() or not SETUPS[name].quantise]
    found = {"loading": 0, "loading in 8 bits": 0} if can_quantise() else {"loading": 0}
    for name in dict.fromkeys(names):  # imports and first runs
        small = dataclasses.replace(SETUPS[name], batch=2, context=24)
        learn(tiny, small, LOOPS[name]) if name in LOOPS else answer(tiny, small)
    for name in found:
        setup = Setup(quantise="int8" if "bits" in name else None)
        found[name] = peak(lambda setup=setup: load(folder, setup))
    for name in dict.fromkeys(names):
        setup = SETUPS[name]
        if name in LOOPS:
            found[name] = peak(lambda name=name, setup=setup: learn(folder, setup, LOOPS[name]))
        else:
            found[name] = peak(lambda setup=setup: answer(folder, setup))
    return found


@pytest.mark.skipif(not CLEAR.exists(), reason="peaks of memory are read from /proc")
def test_plans_are_within_15_percent_of_measured_peaks(tmp_path: Path) -> None:
    save_pretrained(medium_model(), tmp_path)
    # Tensors of a large model are beyond what malloc keeps for later; at this size it is told to keep none.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_plan", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    model = medium_model("meta")
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    predicted = {}
    for name in measured:
        reading = Reading(False, READ_AHEAD, sizes)
        setup = SETUPS.get(name, Setup(context=100, quantise="int8" if "bits" in name else None))
        stages = [PlannedStage("", LOOPS[name])] if name in LOOPS else []
        plan = make_plan(model, setup, None, stages, reading=reading)
        predicted[name] = plan.purposes[0 if "loading" in name else 2 if name in LOOPS else 1]
    for name, purpose in predicted.items():
        print(f"{name}: predicted {purpose.use.of_model / 1e6:.1f} MB, measured {measured[name] / 1e6:.1f} MB")
        assert measured[name] > 70e6, f"{name} is too small to measure"
        assert abs(purpose.use.of_model / measured[name] - 1) < 0.15, name


# ---------------------------------------------------------------- arithmetic


def llama(name: str = "llama-7b", *overrides: str) -> Any:
    return shapes_of(settings_of(str(CONFIGS / f"{name}.yaml"), overrides))


def test_live_bytes_follow_what_is_referred_to() -> None:
    before = torch.empty(1000, device="meta")
    with LiveBytes() as live:
        first = before + 1
        view = first.view(10, 100)[2:]
        assert live.live == 4000
        second = first * 2
        del first
        assert live.live == 8000  # the view keeps it
        del view, second
        assert (live.live, live.peak) == (0, 8000)
        live.restart()
        before.add_(1)
        assert live.peak == 0


def test_quantised_weights_have_the_size_of_their_codes_and_scales() -> None:
    model = llama()
    rest = 2 * (TABLE + 65 * 4096)  # the table and norms stay in float16
    weights, rows = 32 * LAYER + TABLE, 32 * (4 * 4096 + 2 * 11008 + 4096) + 32000
    assert weight_bytes(model) == 2 * (32 * LAYER + 2 * TABLE + 65 * 4096)
    assert weight_bytes(model, chosen_kinds(model, "int8")) == weights + 2 * rows + rest
    groups = weights // 64  # of each a scale and an offset
    assert weight_bytes(model, chosen_kinds(model, "int4")) == weights // 2 + 4 * groups + rest
    head = chosen_kinds(model, {"head": "int8"})
    assert weight_bytes(model) - weight_bytes(model, head) == TABLE - 2 * 32000


def test_quantised_weights_are_those_of_a_real_model_and_what_trains_is_left() -> None:
    pytest.importorskip("torchao")
    from mixformer.quantised import quantise

    choices = {"language": "int4/32", "vision_expert*": "int8"}
    model = tiny_model("cogvlm", hidden_size=64, inner_hidden_size=96)
    planned = weight_bytes(model, chosen_kinds(model, choices))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_expert" in name)
    some = weight_bytes(model, chosen_kinds(model, choices), frozen_only=True)
    experts = sum(p.nbytes for name, p in model.named_parameters() if "vision_expert" in name)
    quantise(model, choices)
    assert planned == weight_bytes(model)
    assert some == planned + experts - sum(p.nbytes for n, p in model.named_parameters() if "vision_expert" in n)


def test_reading_takes_the_largest_tensor_once_more_only_if_it_is_converted() -> None:
    model = llama()
    assert loading_memory(model).of_model - loading_memory(model, reading=Reading(copied=False)).of_model == 2 * TABLE


def test_a_folder_that_is_read_ahead_has_the_next_tensors_in_memory_as_they_are_stored() -> None:
    model = tiny_model("llama").bfloat16()
    sizes = {name: 2 * parameter.nbytes for name, parameter in model.named_parameters()}  # float32 in the files
    weights, largest = weight_bytes(model), max(sizes.values())
    near, far = (loading_memory(model, reading=Reading(True, ahead, sizes)).of_model for ahead in (1, 10**9))
    assert weights < near <= weights + 2 * largest
    assert far >= sum(sizes.values())  # all of it is there before the first is converted
    assert loading_memory(model, reading=Reading(True, 0, sizes)).of_model == weights + largest
    as_it_is = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    assert loading_memory(model, reading=Reading(True, 1, as_it_is)).of_model <= weights + max(as_it_is.values())


def test_answering_takes_the_weights_the_cache_and_little_else() -> None:
    model = llama()
    use = inference_memory(model, answering_peaks(model, Workload(1023, 0, 2)))
    assert use.parts["cache"] == 2 * 1024 * 32 * 2 * 4096 * 2
    assert use.parts["weights"] == weight_bytes(model)
    # In the MLP: its input, normed and not, gate, up, and their product, of 2 rows in float16.
    assert use.parts["activations"] == pytest.approx(2 * 1024 * 2 * (2 * 4096 + 3 * 11008), rel=0.35)


def peaks_of(model: Any, config: TrainConfig, workload: Workload) -> tuple[Any, TrainingPeaks]:
    twin = training_twin(model, config)
    return twin, training_peaks(twin, config, workload)


def test_training_has_gradients_states_and_averages_of_what_is_trained_in_its_dtype() -> None:
    model = tiny_model("cogvlm").bfloat16()
    experts = sum(p.numel() for name, p in model.named_parameters() if "vision_expert" in name)
    roles = [Role("vision_expert*", dtype="float32")]
    config = TrainConfig(trainable=["vision_expert*"], roles=roles, autocast="bfloat16", ema=0.99)
    twin, peaks = peaks_of(model, config, Workload(8, 1, 2))
    assert (peaks.gradients, peaks.states, peaks.average) == (4 * experts, 8 * experts, 4 * experts)
    rest = sum(p.numel() for p in model.parameters()) - experts
    assert training_memory(twin, peaks).parts["weights"] == 2 * rest + 4 * experts
    frozen = peaks_of(model, TrainConfig(trainable=["vision_expert*"]), Workload(8, 1, 2))[1]
    assert (frozen.gradients, frozen.states, frozen.average) == (2 * experts, 4 * experts, 0)


def test_recomputing_and_chunks_of_the_loss_hold_less_and_accumulated_gradients_stay() -> None:
    model = tiny_model("llama", num_layers=8, vocab_size=4000)
    workload, config = Workload(99, 0, 4), TrainConfig(trainable=["*.mlp.*"])
    plain = peaks_of(model, config, workload)[1].activations_alone
    logits = 4 * 100 * 4000 * 4
    chunked = peaks_of(model, dataclasses.replace(config, loss_chunk=20), workload)[1].activations_alone
    assert plain - chunked > 2 * 0.9 * logits
    model.config.checkpoint_activations = True
    recomputed = peaks_of(model, dataclasses.replace(config, loss_chunk=20), workload)[1].activations_alone
    kept = 8 * 4 * 100 * 32 * 4  # the input of every layer
    assert kept < recomputed < 0.5 * chunked
    accumulated = peaks_of(model, dataclasses.replace(config, loss_chunk=20, accumulate=2), workload)[1]
    assert accumulated.earlier_gradients == accumulated.gradients
    assert accumulated.activations >= recomputed


def test_attention_of_products_holds_its_weights() -> None:
    model, workload = tiny_model("llama", num_layers=4), Workload(199, 0, 2)
    fused, products = (
        peaks_of(model, TrainConfig(attention_backend=backend), workload)[1].activations_alone
        for backend in ("auto", "products")
    )
    weights = 4 * 2 * 4 * 200 * 200 * 4  # layers, rows, heads, queries, keys, float32
    assert 0.9 * weights < products - fused < 3 * weights


def test_weights_that_are_trained_are_cast_once_in_mixed_precision() -> None:
    model = tiny_model("llama", num_layers=6)
    model.config.checkpoint_activations = True
    trained = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1)
    plain, mixed = (
        peaks_of(model, TrainConfig(autocast=autocast), Workload(3, 0, 1))[1].activations_alone
        for autocast in (None, "bfloat16")
    )
    assert 2 * trained < mixed < 2 * trained + plain  # all layers' until the forward ends, then one layer's


def test_several_devices_hold_shares_or_all() -> None:
    model = tiny_model("llama", num_layers=4)
    twin, peaks = peaks_of(model, TrainConfig(), Workload(8, 0, 2))
    alone, shared = training_memory(twin, peaks).parts, training_memory(twin, peaks, 4, sharded=True).parts
    for name in ("weights", "optimizer states"):
        assert shared[name] == -(-alone[name] // 4)
    copied = training_memory(twin, peaks, 4).parts
    assert copied["weights"] == alone["weights"] and copied["exchanged gradients"] == alone["gradients"]


def test_stages_are_planned_with_the_sizes_of_their_tasks_and_what_they_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(ROOT / "examples" / "zoo" / "llava" / "tiny.yaml")
    model = shapes_of(settings_of(config))
    connector = sum(p.numel() for name, p in model.named_parameters() if ".projector." in name)
    tower = sum(p.numel() for name, p in model.named_parameters() if ".tower." in name)
    console(["plan", config, "--json", "--devices", "2"])
    align, tune = json.loads(capsys.readouterr().out)["purposes"][2:]
    assert [align["name"], tune["name"]] == ["training (align)", "training (tune)"]
    assert align["setup"]["batch"] == 4  # the task's 8, over two devices
    trained = sum(p.numel() for p in model.parameters()) - tower
    assert [x["use"]["optimizer states"] for x in (align, tune)] == [8 * connector, 8 * trained]
    console(["plan", config, "--json", "--stage", "tune", "--batch", "3", "--context", "70"])
    [purpose] = json.loads(capsys.readouterr().out)["purposes"][2:]
    assert (purpose["setup"]["batch"], purpose["setup"]["context"]) == (3, 70)


def test_a_stage_that_trains_what_its_task_brings_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "cogagent-mini.yaml")
    console(["plan", config, "--batch", "1", "--context", "80"])
    text = " ".join(capsys.readouterr().out.split())
    assert "training (alignment) cannot be planned: The selector '*.dense_reading.*' matches none" in text
    assert "training (all together): 1 row of 80 tokens" in text
    with pytest.raises(SystemExit):
        console(["plan", config, "--stage", "alignment"])
    assert "dense_reading" in capsys.readouterr().err


def test_a_quantised_model_is_planned_as_it_is_and_trains_a_lora_only() -> None:
    model = tiny_model("cogvlm")
    for path, kind in chosen_kinds(model, "int8").items():
        shape_linear(model.get_submodule(path), kind)
    resolve_hooks(model)
    loading, inference, training = make_plan(model, Setup(context=40)).purposes
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert loading.use.parts["weights"] == inference.use.parts["weights"] == weights
    assert training.problem is not None and "--lora" in training.problem
    adapted = make_plan(model, Setup(context=40, lora=2)).purposes[2]
    assert adapted.problem is None and weights < adapted.use.parts["weights"] < 1.5 * weights


def test_rows_are_as_long_as_the_model_is_made_for() -> None:
    assert default_context(tiny_model("llama", max_positions=100), 0) == 100
    assert default_context(llama(), 0) == 2048


# ---------------------------------------------------------------- advice


SHORT = (str(CONFIGS / "llama-7b.yaml"), "--model.num_layers=3", "--context", "512")  # 3 of LLaMA-7B's 32 layers


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    console(["plan", *SHORT, "--json", *arguments])
    return json.loads(capsys.readouterr().out)["purposes"]


def test_what_does_not_fit_is_said_with_what_would_make_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    weights = 2 * (3 * LAYER + 2 * TABLE + 7 * 4096)
    loading, inference, training = planned(capsys, "--memory", "2GB")
    assert not any(purpose["fits"] for purpose in (loading, inference, training))
    assert loading["use"]["total"] == loading["use"]["process"] + weights + 2 * TABLE
    assert inference["use"]["cache"] == 512 * 3 * 2 * 4096 * 2
    assert training["use"]["optimizer states"] == 2 * weights
    for purpose in (loading, inference):
        [way] = purpose["remedies"]
        assert [remedy["change"] for remedy in way] == ["Linears in 8 bits"] and way[-1]["fits"]
    [way] = training["remedies"]  # it is too small a model to be shared by several devices
    assert way[-1]["fits"] and way[-1]["total"] <= 2e9
    assert way[0]["change"] == "only a LoRA trained" and not any(remedy["fits"] for remedy in way[:-1])
    totals = [training["use"]["total"], *(remedy["total"] for remedy in way)]
    assert all(after < 0.99 * before for before, after in pairwise(totals))


def test_large_models_are_shared_by_as_many_devices_as_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    training = planned(capsys, "--memory", "4GB", "--model.num_layers=4", "--model.vocab_size=64000")[2]
    assert training["use"]["weights"] > 2e9
    first, second = training["remedies"]
    assert first[-1]["fits"] and second[-1]["fits"] and re.fullmatch(r"\d+ devices", second[-1]["change"])
    assert [remedy["total"] for remedy in second] == sorted((r["total"] for r in second), reverse=True)


def test_advice_is_given_only_where_it_changes_something(capsys: pytest.CaptureFixture[str]) -> None:
    console(["plan", *SHORT, "--memory", "1000GB"])
    text = capsys.readouterr().out
    assert "fits" in text and "What would make" not in text
    console(["plan", *SHORT, "--memory", "1GB", "--lora", "4", "--quantise", "int4"])
    text = capsys.readouterr().out
    assert "No change that is known here makes loading fit." in text
    assert "in 8 bits" not in text and "only a LoRA" not in text and "float16" in text


def test_float32_weights_and_several_rows_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    inference = planned(capsys, "--memory", "2.5GB", "--batch", "9", "--dtype", "float32")[1]
    assert inference["use"]["weights"] == 4 * (3 * LAYER + 2 * TABLE + 7 * 4096)
    changes = [remedy["change"] for remedy in inference["remedies"][0]]
    assert changes == ["weights in bfloat16", "one row at a time"] and inference["remedies"][0][-1]["fits"]


def test_every_kind_of_model_can_be_planned() -> None:
    for name in ("clip", "simvlm", "idefics2", "lenet"):
        model = shapes_of(settings_of(str(ROOT / "examples" / "zoo" / name / "tiny.yaml"), ["--model.eos_token_id=null"]
                                      if name == "clip" else []))  # fmt: skip
        plan = make_plan(model, Setup(context=default_context(model, 1)))
        assert [purpose.name for purpose in plan.purposes] == ["loading", "inference", "training"]
        assert all(purpose.use.of_model > 0 and purpose.fits is None for purpose in plan.purposes)


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava = str(ROOT / "examples" / "zoo" / "llava" / "tiny.yaml")
    for arguments, said in {
        (str(tmp_path / "nowhere"),): "does not exist",
        (llava, "--memory", "24XB"): "--memory is '24XB', which is no size",
        (llava, "--memory", "0"): "--memory is '0'",
        (llava, "--quantise", "int3"): "'int3' is no kind",
        (llava, "--quantise", "{langauge: int8}"): "langauge",
        (llava, "--context", "10"): "do not fit into a context of 10 tokens",
        (llava, "--devices", "0"): "--devices is 0",
        (llava, "--images", "-1"): "--images is -1",
        (llava, "--stage", "algin"): "There is no stage 'algin'. The file has: ",
        (llava, "--model.hiden_size=3"): "Did you mean 'hidden_size'",
        (llava, "--mixins.image.projector", "x"): "mixins.image",
        (str(ROOT / "examples" / "recipes" / "cogagent-cross.yaml"),): "--weights null",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            console(["plan", *arguments])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == "" and said in err and "Traceback" not in err, (arguments, err)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
