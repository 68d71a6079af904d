"""LeNet-5, ResNet and NF-ResNet: counts, connections, statistics, and the properties of every composition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixformer import BaseMixin, BaseModel, from_pretrained
from mixformer.checkpoint import save_pretrained
from mixformer.mixins import CodeHeadMixin, ConvStemMixin, ImageMixin, LeNetMixin, NFResNetMixin, ResNetMixin
from mixformer.mixins.code_head import digit_codes
from mixformer.testing import check_mixin, tiny_model
from mixformer.train import TrainConfig, train
from models.lenet import LeNet5, LeNet5Config, LeNet5Scores
from models.nf_resnet import NFResNet, NFResNetConfig
from models.resnet import ResNet, ResNetConfig
from tests.zoo.harness import jittered
from tests.zoo.lenet import TABLE
from tests.zoo.resnet import converted, tiny_hf

TINY: dict[str, Any] = {"image_size": 16, "channels": [8, 16, 24], "depths": [2, 1]}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("part", "count"),
    [("stem.c1", 156), ("stem.s2", 12), ("stem.c3", 1516), ("stem.s4", 32), ("stem.c5", 48120), ("head.f6", 10164)],
)
def test_each_part_of_lenet_has_its_published_number_of_parameters(part: str, count: int) -> None:
    module = LeNet5().mixins.get_submodule(part)
    assert sum(parameter.numel() for parameter in module.parameters()) == count


def test_maps_of_c3_see_those_maps_of_s2_that_the_table_names() -> None:
    stem: Any = LeNet5().get_mixin("stem")
    maps = random(1, 6, 14, 14).requires_grad_()
    seen = [
        [bool(torch.autograd.grad(out.sum(), maps, retain_graph=True)[0][0, row].any()) for row in range(6)]
        for out in stem.c3(maps)[0]
    ]
    expected = [[line[column] == "X" for line in TABLE.split()] for column in range(16)]
    assert seen == expected


def test_fresh_weights_of_lenet_are_uniform_within_the_published_bounds() -> None:
    model: Any = LeNet5(generator=torch.Generator().manual_seed(1))
    stem, head, start = model.get_mixin("stem"), model.get_mixin("head"), 0
    for column in range(16):
        count = sum(line[column] == "X" for line in TABLE.split())
        bound = 2.4 / (25 * count)
        largest = stem.c3.weight[start : start + count].abs().max()
        assert 0.9 * bound < largest <= bound and abs(stem.c3.bias[column]) <= bound
        start += count
    for weight, fan_in in ((stem.c1.weight, 25), (stem.c5.weight, 400), (head.f6.weight, 120)):
        largest = weight.abs().max()
        assert 0.9 * 2.4 / fan_in < largest <= 2.4 / fan_in
        assert abs(float(weight.detach().std()) * 3**0.5 * fan_in / 2.4 - 1) < 0.2
    assert stem.s2.coefficient.abs().max() <= 0.6 and stem.s4.bias.abs().max() <= 0.6


def test_codes_are_signs_no_two_alike_and_never_learnt() -> None:
    codes = digit_codes()
    assert codes.shape == (10, 84) and bool((codes.abs() == 1).all())
    distances = (codes[:, None] - codes).square().sum(-1) + 1e9 * torch.eye(10)
    assert distances.min() >= 40  # ten units or more tell any two digits apart
    model = LeNet5()
    assert "mixins.head.codes" in model.state_dict() and "mixins.head.codes" not in dict(model.named_parameters())


def test_scores_are_negative_distances_and_their_cross_entropy_is_the_papers_second_criterion_without_rubbish() -> None:
    distances, scores = jittered(LeNet5()), jittered(LeNet5Scores())
    scores.load_state_dict(distances.state_dict())
    images, labels = random(3, 1, 32, 32), torch.tensor([1, 8, 4])
    with torch.no_grad():
        far = distances(images=images)
        assert torch.equal(scores(images=images), -far)
        assert torch.equal(scores(images=images).argmax(1), far.argmin(1))
        expected = sum(far[i, c] + torch.log(torch.exp(-far[i].double()).sum()) for i, c in enumerate(labels.tolist()))
        loss = LeNet5Scores.objective(scores, {"images": images, "labels": labels})["classification"]  # type: ignore
    assert abs(float(loss) - float(expected) / 3) < 1e-4 * abs(float(expected))


def test_lenet_learns_ten_pictures() -> None:
    model = LeNet5(generator=torch.Generator().manual_seed(0))
    batch = {"images": random(10, 1, 32, 32), "labels": torch.arange(10)}
    config = TrainConfig(steps=150, learning_rate=5e-3, warmup_steps=0, weight_decay=0.0, progress=False)
    train(model, iter([batch] * 150), config)
    assert torch.equal(model(images=batch["images"]).argmin(1), batch["labels"])


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 2, 32, 32), (1, 32, 32)])
def test_pictures_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[m, 1 or 3, 32, 32\] for this network; got"):
        LeNet5()(images=torch.zeros(shape))


def test_a_stem_without_a_feature_map_says_what_is_missing() -> None:
    model = BaseModel(LeNet5Config())
    model.add_mixin("stem", ConvStemMixin(8, 1))
    with pytest.raises(TypeError, match="ConvStemMixin must define feature_map"):
        model(images=torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("depths", [[3, 4, 6, 3], [3, 4, 23, 3], [3, 8, 36, 3]])
def test_deep_resnets_have_as_many_parameters_as_hfs(depths: list[int]) -> None:
    from transformers import ResNetConfig as HFConfig
    from transformers import ResNetForImageClassification

    with torch.device("meta"):
        reference = ResNetForImageClassification(HFConfig(depths=depths, num_labels=1000))
    ours = ResNet(ResNetConfig(depths=depths), device="meta")
    for kind in ("parameters", "buffers"):
        count = sum(tensor.numel() for tensor in getattr(reference, kind)())
        assert sum(tensor.numel() for tensor in getattr(ours, kind)()) == count


def test_a_training_step_with_batch_norm_equals_hfs() -> None:
    reference = tiny_hf()
    model, images, labels = converted(reference).train(), random(4, 3, 224, 224), torch.tensor([1, 6, 0, 3])
    reference.train()
    for ours, loss in (
        (model, ResNet.objective(model, {"images": images, "labels": labels})["classification"]),  # type: ignore
        (reference, reference(images, labels=labels).loss),
    ):
        loss.backward()
        torch.optim.SGD(ours.parameters(), 0.1).step()
    stepped = converted(reference)
    found, expected = model.state_dict(), stepped.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=0, msg=name)
    assert found["mixins.stem.stem.norm.num_batches_tracked"] == 1
    before = converted(tiny_hf()).state_dict()
    assert not torch.equal(found["mixins.stem.stem.norm.running_mean"], before["mixins.stem.stem.norm.running_mean"])


@pytest.mark.parametrize(
    ("frozen", "still"), [("mixins.stem.*", "mixins.stem."), ("*.stages.0.*", "mixins.stem.stages.0.")]
)
def test_frozen_batch_norms_keep_their_statistics_and_use_them(frozen: str, still: str) -> None:
    model = jittered(ResNet(ResNetConfig(**TINY, num_classes=5)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"images": random(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 3])}
    train(model, iter([batch] * 2), TrainConfig(steps=2, frozen=[frozen], progress=False))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(still) for name in changed)
    if frozen != "mixins.stem.*":
        assert {"mixins.stem.stem.norm.running_mean", "mixins.stem.stages.1.0.shortcut.norm.running_var"} <= changed


def test_a_frozen_stem_gives_in_training_what_it_gives_in_evaluation() -> None:
    model = jittered(ResNet(ResNetConfig(**TINY, output="patches")))
    images = random(3, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval()(images=images)
        assert not torch.equal(model.train()(images=images), expected)
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = jittered(ResNet(ResNetConfig(**TINY, output="patches"))).requires_grad_(False).train()
    assert torch.equal(frozen(images=images), expected)
    model(images=images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_hf_folders_are_read_and_written_back(kind: str, tmp_path: Path) -> None:
    from transformers import ResNetForImageClassification

    reference = tiny_hf(layer_type=kind, depths=[1, 2], hidden_sizes=[8, 12], downsample_in_bottleneck=True)
    model = converted(reference)
    save_pretrained(model, tmp_path / "hf", format="hf")
    again = ResNetForImageClassification.from_pretrained(tmp_path / "hf")
    assert again.config.layer_type == kind and again.config.downsample_in_bottleneck
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    save_pretrained(model, tmp_path / "own")
    copy = from_pretrained(tmp_path / "own", dtype=torch.bfloat16)
    assert copy.state_dict()["mixins.stem.stem.norm.num_batches_tracked"].dtype == torch.int64
    assert copy.config == model.config


def test_an_hf_backbone_without_a_head_gives_pooled_features(tmp_path: Path) -> None:
    reference = tiny_hf().resnet
    reference.save_pretrained(tmp_path)
    model, images = from_pretrained(tmp_path), random(2, 3, 224, 224)
    with torch.no_grad():
        expected = reference(images)
        assert torch.equal(model(images=images), expected.pooler_output.flatten(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_act": "gelu"}, "activation is 'gelu'"), ({"downsample_in_first_stage": True}, "its first stage halves")],
)
def test_variants_of_hf_that_are_not_supported_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_hf(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [1]}, r"Stages of \[16, 24\] channels need one depth each"),
        ({"channels": [8, 16, 26]}, "4 must divide"),
        ({"channels": []}, "hidden_size is 0"),
        ({"image_size": 20}, "does not divide into patches of 8"),
        ({"output": "tokens"}, "choose one of patches, pooled, logits"),
    ],
)
def test_sizes_that_make_no_network_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(ResNetConfig(**{**TINY, **options}))


def test_a_normaliser_free_network_keeps_unit_variance_at_the_start_of_each_stage() -> None:
    sizes: dict[str, Any] = {"channels": [64, 128, 256, 256], "depths": [4, 4, 4], "image_size": 64}
    model: Any = NFResNet(NFResNetConfig(**sizes), generator=torch.Generator().manual_seed(0))
    stem, blocks = model.get_mixin("stem"), []
    for stage in stem.stages:
        for block in stage:
            block.register_forward_pre_hook(lambda module, inputs: blocks.append((module.deviation, inputs[0].std())))
    with torch.no_grad():
        model(images=random(8, 3, 64, 64))
    for predicted, measured in blocks[1:]:  # the pooling before the first block is not part of the scheme
        assert 0.75 < float(measured) / predicted < 1.25
    assert [round(predicted**2, 2) for predicted, _ in blocks] == [1.0, *[1.04, 1.08, 1.12, 1.16] * 2, 1.04, 1.08, 1.12]


def test_weights_of_a_normaliser_free_network_may_be_scaled_and_moved() -> None:
    model = jittered(NFResNet(NFResNetConfig(**TINY)))
    images = random(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images=images)
        for name, parameter in model.named_parameters():
            if name.startswith("mixins.stem.") and name.endswith(".weight"):
                parameter.mul_(3).add_(0.5)
        torch.testing.assert_close(model(images=images), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("output", ["patches", "pooled"])
@pytest.mark.parametrize("config", [ResNetConfig, NFResNetConfig])
def test_a_resnet_is_a_tower_of_a_language_model(config: type[ResNetConfig], output: str) -> None:
    tower = config(image_size=32, channels=[8, 16, 24], depths=[1, 1], output=output)
    model = tiny_model("llama")
    mixin: Any = ImageMixin(tower, marks=False, position_ids="counted", image_token_id=9)
    model.add_mixin("image", mixin)
    assert mixin.num_features == (16 if output == "patches" else 1)
    ids = torch.tensor([[1, *[9] * mixin.num_features, 5, 4]])
    logits = jittered(model)(ids, images=random(1, 3, 32, 32))
    logits[0, -1].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mixin.tower.parameters())


CASES: list[tuple[str, Callable[[], BaseMixin], Callable[[], BaseModel], str | None]] = [
    ("lenet", LeNetMixin, lambda: BaseModel(LeNet5Config()), None),
    ("codes", CodeHeadMixin, LeNet5, "head"),
    ("scores", lambda: CodeHeadMixin(scores=True), LeNet5, "head"),
    ("resnet", lambda: ResNetMixin(**TINY), lambda: BaseModel(ResNetConfig(**TINY)), None),
    ("basic", lambda: ResNetMixin(**TINY, bottleneck=False), lambda: BaseModel(ResNetConfig(**TINY)), None),
    ("nf_resnet", lambda: NFResNetMixin(**TINY, alpha=0.3), lambda: BaseModel(ResNetConfig(**TINY)), None),
]


@pytest.mark.parametrize(("make_mixin", "model", "replacing"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_every_property_holds(
    make_mixin: Callable[[], BaseMixin], model: Callable[[], BaseModel], replacing: str | None
) -> None:
    report = check_mixin(make_mixin, model, replacing=replacing, compile=True)
    assert isinstance(report["gradients reach every trainable parameter"], float)
    assert isinstance(report["compiled equals eager"], float)
