"""Features on disk: the same bit for bit as computed, whatever happens to the files, whoever else writes them."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixformer import BaseModel
from mixformer.connectors import PerceiverResamplerConfig, ProjectorConfig
from mixformer.data import feature_cache
from mixformer.data.feature_cache import CachedFeaturesTask, CachedTower, FeatureCache
from mixformer.data.packing import PackedTask
from mixformer.mixins import ImageMixin, LoRAMixin
from mixformer.objectives import LanguageObjective
from mixformer.testing import collate, sample_row, tiny_model
from mixformer.train.task import Task
from models.git import GITVisionConfig
from models.idefics2 import Idefics2VisionConfig

Make = Callable[..., BaseModel]
ROOT = Path(__file__).parents[1]
KEYS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(40)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.features"))


def frozen(model: BaseModel) -> BaseModel:
    for name in ("image", "cross"):
        if name in model.mixins:
            model.get_mixin(name).tower.requires_grad_(False)
    return model


def batch_of(model: BaseModel, counts: tuple[int, ...] = (1, 0, 2), seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    batch = collate([sample_row(model, count, 6, generator) for count in counts], "right")
    text = batch["attention_mask"].bool() & (batch.get("token_type_ids", torch.zeros(1)) == 0)
    return {**batch, "labels": torch.where(text, batch["input_ids"], -100)}


class Given(Task):
    """The same batches again and again."""

    def __init__(self, *batches: dict[str, Any]) -> None:
        self.given = batches

    def batches(self) -> Iterator[Any]:
        while True:
            yield from self.given

    def validation(self) -> list[Any]:
        return list(self.given)


# ---------------------------------------------------------------- the store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    cache, features = FeatureCache(tmp_path), torch.randn(1, 3, 5).to(dtype)
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], features)
    found = FeatureCache(tmp_path).get(KEYS[0])
    assert found is not None and found.dtype == dtype and torch.equal(found, features)
    assert (cache.hits, cache.misses, cache.damaged) == (0, 1, 0)
    assert [path.name for path in tmp_path.glob("*/*")] == [f"{KEYS[0]}.features"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_entry_is_noticed_counted_and_written_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path)
    cache.put(KEYS[0], torch.ones(1, 2, 3))
    path = cache.path(KEYS[0])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    changed = {"flipped": bytes(data), "cut": bytes(data[:-5]), "empty": b"", "other": b"x" * 40}[damage]
    path.write_bytes(changed)
    assert cache.get(KEYS[0]) is None
    assert (cache.hits, cache.misses, cache.damaged) == (0, 1, 1)
    assert path.name in caplog.text
    cache.put(KEYS[0], torch.ones(1, 2, 3))
    found = cache.get(KEYS[0])
    assert found is not None and torch.equal(found, torch.ones(1, 2, 3))


def test_the_oldest_entries_go_when_the_folder_is_full(tmp_path: Path) -> None:
    probe = FeatureCache(tmp_path / "probe")
    probe.put(KEYS[0], torch.zeros(1, 4, 8))
    size = probe.path(KEYS[0]).stat().st_size
    folder = tmp_path / "full"
    cache = FeatureCache(folder, 5 * size + 3)
    for age, key in enumerate(KEYS[:12]):
        cache.put(key, torch.full((1, 4, 8), float(age)))
        os.utime(cache.path(key), (1e9 + age, 1e9 + age))
        assert sum(path.stat().st_size for path in files(folder)) <= 5 * size + 3
    assert {path.stem for path in files(folder)} == set(KEYS[7:12])
    assert cache.evicted == 7


def test_what_dead_processes_left_behind_is_removed_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    folder = cache.path(KEYS[0]).parent
    folder.mkdir()
    dead, living = folder / "dead.partial", folder / "living.partial"
    for path in (dead, living):
        path.write_bytes(b"half")
    os.utime(dead, (1e9, 1e9))
    cache.put(KEYS[0], torch.zeros(1, 1, 1))
    assert not dead.exists() and living.exists()


def test_a_write_that_fails_leaves_the_old_entry_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(tmp_path)
    cache.put(KEYS[0], torch.zeros(1, 1, 1))

    def fail(*paths: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        cache.put(KEYS[0], torch.ones(1, 1, 1))
    found = cache.get(KEYS[0])
    assert found is not None and not found.any()
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_a_full_disk_leaves_training_going_and_is_said_once(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    tower = frozen(make("cogvlm")).get_mixin("image").tower
    images = torch.randn(3, 3, 28, 28)
    cached = CachedTower(tower, FeatureCache(tmp_path / "kept"))
    expected = torch.cat([tower(images=image[None]) for image in images])
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # no file may grow beyond 100 bytes
    try:
        found = [cached(images) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert all(torch.equal(features, expected) for features in found)
    assert (cached.cache.misses, cached.cache.unwritten) == (6, 6)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (message,) = caplog.messages
    assert message.startswith(f"Features cannot be kept in {tmp_path / 'kept'} (File too large)")
    assert torch.equal(cached(images), expected) and torch.equal(cached(images), expected)  # there is room again
    assert (cached.cache.hits, len(files(tmp_path / "kept"))) == (3, 3)


def test_a_folder_that_cannot_be_used_leaves_training_going(tmp_path: Path, make: Make) -> None:
    tower, images = frozen(make("cogvlm")).get_mixin("image").tower, torch.randn(1, 3, 28, 28)
    (tmp_path / "file").write_text("", encoding="utf-8")
    cached = CachedTower(tower, FeatureCache(tmp_path / "file"))
    assert torch.equal(cached(images), tower(images=images)) and cached.cache.unwritten == 1


def test_entries_can_be_read_by_those_who_may_read_the_folder(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        cache = FeatureCache(tmp_path)
        cache.put(KEYS[0], torch.zeros(1, 1, 1))
    finally:
        os.umask(before)
    assert cache.path(KEYS[0]).stat().st_mode & 0o777 == 0o644


BOUND = 60_000
WRITER = """
import pathlib, random, sys, time, torch
from mixformer.data import feature_cache
from mixformer.data.feature_cache import FeatureCache
folder, rank, bound, *keys = sys.argv[1:]
pathlib.Path(folder, rank).touch()
while not all(pathlib.Path(folder, other).exists() for other in "01"):
    time.sleep(0.001)
draws = random.Random(int(rank))
for part, size in (("free", 10**9), ("bounded", int(bound))):
    cache = FeatureCache(pathlib.Path(folder, part), size)
    for step in range(300):
        number = draws.randrange(len(keys))
        expected = torch.full((1, 40, 50), float(number))
        found = None if step % 3 == 0 else cache.get(keys[number])
        if found is None:
            cache.put(keys[number], expected)
        elif not torch.equal(found, expected):
            raise SystemExit(f"entry {number} is not what was written")
    print(cache.hits, cache.misses, cache.damaged)
"""


def test_processes_that_write_the_same_keys_never_read_half_an_entry(tmp_path: Path) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(rank), str(BOUND), *KEYS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    processes = [start(rank) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for output in outputs:
        for hits, misses, damaged in (line.split() for line in output.splitlines()):
            assert int(hits) > 0 and int(hits) + int(misses) == 200 and damaged == "0"
    assert not list(tmp_path.glob("*/*/*.partial"))
    assert len(files(tmp_path / "free")) == len(KEYS)
    assert 0 < sum(path.stat().st_size for path in files(tmp_path / "bounded")) <= BOUND


# ---------------------------------------------------------------- towers


def test_features_are_those_of_the_tower_for_each_picture_alone(tmp_path: Path, make: Make) -> None:
    tower = frozen(make("cogvlm")).get_mixin("image").tower
    images, cached = torch.randn(3, 3, 28, 28), CachedTower(tower, FeatureCache(tmp_path))
    expected = torch.cat([tower(images=image[None]) for image in images])
    assert torch.equal(cached(images), expected)
    assert torch.equal(cached(images[[2, 0, 1]]), expected[[2, 0, 1]])
    assert (cached.cache.hits, cached.cache.misses) == (3, 3)
    assert torch.equal(CachedTower(tower, FeatureCache(tmp_path))(images), expected)


def test_everything_that_features_follow_from_is_in_the_key(tmp_path: Path, make: Make) -> None:
    cache, images = FeatureCache(tmp_path), torch.randn(1, 3, 28, 28)
    model = frozen(make("cogvlm"))
    tower = model.get_mixin("image").tower
    kept = CachedTower(tower, cache)

    def misses(cached: CachedTower, pictures: torch.Tensor = images) -> int:
        before = cache.misses
        cached(pictures)
        return cache.misses - before

    assert misses(kept) == 1 and misses(kept) == 0
    assert misses(kept, images + 1e-6) == 1
    assert misses(CachedTower(tower, cache, autocast="bfloat16")) == 1
    with torch.no_grad():
        tower.transformer.layers[0].mlp.up.weight[0, 0] += 1e-3
    assert misses(kept) == 1 and misses(kept) == 0
    model.add_mixin("image.tower/lora", LoRAMixin(["dense"], rank=2))
    frozen(model)
    assert misses(kept) == 1
    model.del_mixin("image.tower/lora")
    assert misses(kept) == 0
    other = frozen(make("cogvlm"))
    assert misses(CachedTower(other.get_mixin("image").tower, cache)) == 0
    assert misses(CachedTower(other.to(torch.bfloat16).get_mixin("image").tower, cache)) == 1


def test_weights_are_read_once_as_long_as_they_do_not_change(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = frozen(make("cogvlm")).get_mixin("image").tower
    read: list[int] = []

    def counted(tensors: Any, *texts: str) -> str:
        tensors = list(tensors)
        read.append(len(tensors))
        return digest(tensors, *texts)

    digest = feature_cache._digest
    monkeypatch.setattr(feature_cache, "_digest", counted)
    cached = CachedTower(tower, FeatureCache(tmp_path))
    for _ in range(3):
        cached(torch.zeros(1, 3, 28, 28))
    assert sorted(read) == [1, 1, 1, len(tower.state_dict())]


def test_further_inputs_of_a_tower_are_in_the_key(tmp_path: Path) -> None:
    size: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 16, "patch_size": 8}
    tower = GITVisionConfig(**size, num_frames=3).build().requires_grad_(False).eval()
    cached, images = CachedTower(tower, FeatureCache(tmp_path)), torch.randn(1, 3, 16, 16).expand(3, -1, -1, -1)
    frames = torch.tensor([0, 1, 0])
    found = cached(images, frame_ids=frames)
    assert cached.cache.misses == 2 and cached.cache.hits == 1
    torch.testing.assert_close(found, tower(images=images, frame_ids=frames), rtol=1e-6, atol=1e-6)


def test_a_damaged_entry_is_computed_again(tmp_path: Path, make: Make) -> None:
    tower = frozen(make("cogvlm")).get_mixin("image").tower
    cached, images = CachedTower(tower, FeatureCache(tmp_path)), torch.randn(1, 3, 28, 28)
    expected = cached(images)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert torch.equal(cached(images), expected)
    assert cached.cache.damaged == 1
    assert torch.equal(cached(images), expected) and cached.cache.damaged == 1


def test_a_tower_that_is_trained_is_refused(tmp_path: Path, make: Make) -> None:
    model = make("cogvlm")
    image, pictures = model.get_mixin("image"), torch.randn(1, 3, 28, 28)
    with pytest.raises(ValueError, match=r"tower of mixin 'image' is trained .* freeze mixins\.image\.tower"):
        CachedTower(image.tower, FeatureCache(tmp_path))(pictures)
    with torch.no_grad():
        features = image.tower(images=pictures)
        row = sample_row(model, 1)
        model(**{**row, "images": features})
    with pytest.raises(ValueError, match=r"tower of mixin 'image' is trained, but ready features teach it nothing"):
        model(**{**row, "images": features})
    with pytest.raises(ValueError, match=r"\[1, 3, 16\], which is neither pictures .* features \[m, 4, 16\]"):
        model(**{**row, "images": features[:, :3]})


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["cogvlm", "cogvlm2", "cogagent"])
def test_training_with_kept_features_is_training_with_recomputed_ones_bit_for_bit(
    tmp_path: Path, make: Make, kind: str
) -> None:
    model, objective = frozen(make(kind)).train(), LanguageObjective()
    given = [batch_of(model, (1,), seed) for seed in range(3)]
    recomputed = []
    for batch in given:
        model.zero_grad()
        loss = objective(model, batch)["language"]
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        recomputed.append((loss.detach(), gradients))
    task = CachedFeaturesTask(Given(*given), str(tmp_path))
    task.prepare(model, None)
    stream = task.batches()
    for number in range(6):
        batch = next(stream)
        assert batch["images"].dim() == 3
        model.zero_grad()
        loss = task.loss(model, batch)["language"]
        loss.backward()
        expected, gradients = recomputed[number % 3]
        assert torch.equal(loss, expected)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == gradients.keys()
        assert all(torch.equal(gradient, gradients[name]) for name, gradient in found.items())
    towers = 2 if kind == "cogagent" else 1
    assert (task.cache.misses, task.cache.hits) == (3 * towers, 3 * towers)
    task.finish(model)


@pytest.mark.parametrize("kind", ["cogvlm", "cogagent"])
def test_batches_of_several_pictures_give_the_same_logits(tmp_path: Path, make: Make, kind: str) -> None:
    model = frozen(make(kind))
    batch = batch_of(model)
    task = CachedFeaturesTask(Given(batch), str(tmp_path))
    task.prepare(model, None)
    found = next(task.batches())
    with torch.no_grad():
        logits = [model(**{n: v for n, v in one.items() if n != "labels"}) for one in (found, batch)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    validation = task.validation()
    assert validation is not None
    for _ in range(2):
        assert [one["images"].shape for one in validation] == [found["images"].shape]


def test_text_alone_and_towers_that_are_not_named_are_left_alone(tmp_path: Path, make: Make) -> None:
    model = make("cogagent")
    model.get_mixin("cross").tower.requires_grad_(False)
    text, batch = batch_of(model, (0, 0)), batch_of(model)
    task = CachedFeaturesTask(Given(text, batch), str(tmp_path), mixins=["cross"])
    task.prepare(model, None)
    stream = task.batches()
    assert next(stream).keys() == text.keys()
    found = next(stream)
    assert found["images"] is batch["images"] and found["cross_images"].dim() == 3
    LanguageObjective()(model, found)["language"].backward()
    assert model.get_mixin("image").tower.transformer.layers[0].mlp.up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("inside", [True, False])
def test_packed_rows_can_have_kept_features(tmp_path: Path, make: Make, inside: bool) -> None:
    model = frozen(make("cogagent"))
    batch = batch_of(model, (1, 0, 2, 1))

    def features(task: Task) -> CachedFeaturesTask:
        return CachedFeaturesTask(task, str(tmp_path))

    given = Given(batch)
    task = PackedTask(features(given), 32, buffer=4) if inside else features(PackedTask(given, 32, buffer=4))
    task.prepare(model, None)
    found, plain = next(task.batches()), next(PackedTask(given, 32, buffer=4).batches())
    assert found["images"].dim() == found["cross_images"].dim() == 3
    with torch.no_grad():
        logits = [model(**{n: v for n, v in one.items() if n != "labels"}) for one in (found, plain)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    task.finish(model)


def test_mixins_without_a_tower_and_adapters_that_need_its_padding_are_refused(tmp_path: Path) -> None:
    model = tiny_model("cogvlm")
    with pytest.raises(ValueError, match="mixin 'cross' has no tower; those that have one: image"):
        CachedFeaturesTask(Given(), str(tmp_path), mixins=["cross"]).prepare(model, None)
    model = tiny_model("llama")
    adapter = PerceiverResamplerConfig(num_latents=2, num_heads=2, head_size=8, output_projector=ProjectorConfig())
    size: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 16, "patch_size": 8}
    model.add_mixin("image", ImageMixin(Idefics2VisionConfig(**size), adapter))
    with pytest.raises(ValueError, match="must know which features are padding"):
        CachedFeaturesTask(Given(), str(tmp_path)).prepare(model, None)
