"""Every system equals its reference, has its published size, and is described, trained and asked by its command."""

from __future__ import annotations

import functools
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from mixformer import from_pretrained
from mixformer.cli import main
from mixformer.config import read_settings
from mixformer.mixins import LoRAMixin
from mixformer.testing import check_mixin
from tests.zoo.harness import ROOT, TOLERANCE, Size, System, systems

SYSTEMS = systems()
each_system = pytest.mark.parametrize("system", [pytest.param(system, id=system.key) for system in SYSTEMS])


@each_system
def test_the_outputs_equal_the_references(system: System) -> None:
    differences = system.parity()
    assert differences, "nothing was compared"
    worst = max(differences, key=lambda what: differences[what])
    assert differences[worst] <= TOLERANCE, f"{worst}: {differences[worst]:.1e}"


@pytest.mark.parametrize(
    ("system", "size"),
    [pytest.param(s, size, id=f"{s.key}-{name}") for s in SYSTEMS for name, size in s.sizes.items()],
)
def test_the_full_size_has_the_published_number_of_parameters(system: System, size: Size) -> None:
    assert system.count(size) == size.parameters


@each_system
def test_the_model_file_only_composes(system: System) -> None:
    assert len(system.model_file.read_text(encoding="utf-8").splitlines()) < 80


@each_system
def test_every_stage_trains_something_that_is_there(system: System) -> None:
    model_class, names = system.model_class, [name for name, _ in system.build_tiny().named_parameters()]
    assert model_class.objective is not None and model_class.stages
    for stage, trained in model_class.stages.items():
        for pattern in [*trained.trainable, *trained.frozen]:
            assert any(fnmatchcase(name, pattern) for name in names), f"{stage}: {pattern}"


@each_system
def test_every_composition_has_every_property(system: System) -> None:
    pairs = system.key == "clip"  # its pictures stand beside the texts, and random texts have no end
    settings = read_settings(system.model_class, system.tiny, ["--model.eos_token_id", "null"] if pairs else [], ())

    def picture(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        side, generator = settings.model.vision.image_size, torch.Generator().manual_seed(int(ids.sum()))
        return {"images": torch.randn(1, 3, side, side, generator=generator)}

    lora = functools.partial(LoRAMixin, ["*"], rank=2)
    report = check_mixin(lora, settings.build_model, extra_inputs=picture if pairs else None)
    assert len([value for value in report.values() if not isinstance(value, str)]) >= 8, str(report)


@each_system
def test_describe_counts_the_tiny_model(
    system: System, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    main(system.model, ["--config", str(system.tiny), "--job", "describe", "--json"])
    expected = sum(parameter.numel() for parameter in system.build_tiny().parameters())
    assert json.loads(capsys.readouterr().out)["parameters"] == expected


@each_system
def test_the_command_trains_and_the_result_answers(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = ["--config", str(system.tiny)]
    main(system.model, [*command, "--job", "train", "--train.output", str(tmp_path / "trained"), "--json"])
    result = json.loads(capsys.readouterr().out)
    settings = read_settings(system.model_class, system.tiny, [], ("train",))
    fresh, trained = settings.build_model().state_dict(), from_pretrained(tmp_path / "trained")
    stages = settings.train.stages
    assert all(result[stage.name]["total"] > 0 for stage in stages)
    names = [name for name, _ in trained.named_parameters()]
    moved = set()
    for stage in stages:
        parts = type(trained).stages[stage.trains]
        moved |= {
            name for name in names
            if any(fnmatchcase(name, p) for p in parts.trainable)
            and not any(fnmatchcase(name, p) for p in parts.frozen)
        }
    changed = {name for name in names if not torch.equal(fresh[name], trained.state_dict()[name])}
    assert changed and changed <= moved
    asked = ["--prompt", "What is this?"]
    if system.images:
        asked += ["--image", str(next((ROOT / "examples" / "zoo" / "shapes").glob("*.png")))]
    asked += ["--weights", str(tmp_path / "trained"), "--chat.max_new_tokens", "4", "--json"]
    if system.chats:
        main(system.model, [*command, *asked])
        assert isinstance(json.loads(capsys.readouterr().out)["answer"], str)
    else:
        with pytest.raises(SystemExit):
            main(system.model, [*command, *asked])
        assert re.search("writes no text|reads whole sequences only", capsys.readouterr().err)
