"""Features of frozen towers on disk, computed once for each picture.

An entry is named by the SHA-256 of all that it follows from: the pixels as preprocessed (so the picture and how it was
brought to size), the tower's composition and weights, and what it ran on. Files are written beside their place and
moved there, and carry a checksum: any number of processes may use one folder without waiting for each other. What
cannot be read is computed, and what cannot be written, say because the disk is full, is computed each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mixformer.mixins.cross_attention import CrossAttentionMixin
from mixformer.mixins.image_tokens import ImageTokensMixin
from mixformer.shards import parse_size
from mixformer.train.task import Task
from mixformer.train.wrapped_task import WrappedTask

Batch = dict[str, Any]
_SUFFIX, _PARTIAL = ".features", ".partial"
_DIGEST_SIZE = hashlib.sha256().digest_size
_ABANDONED = 3600.0  # seconds after which a file that was never moved to its place belongs to a dead process
log = logging.getLogger(__name__)


class FeatureCache:
    """Tensors by key in a folder of bounded size.

    The oldest entries go first. The folder is measured at the first entry written and whenever this process has
    written a 64th of the bound, so that several processes may exceed it by as much each.

    Args:
        folder: made when the first entry is written.
        max_bytes: bound of all files together, a number or a text such as `10GB`.

    Attributes:
        hits, misses: how often an entry was there and was not.
        damaged: entries that were not what was written; each is also a miss, and is written anew.
        evicted: entries that had to go.
        unwritten: entries that a tower computed and that could not be written.
    """

    def __init__(self, folder: str | Path, max_bytes: int | str = "10GB") -> None:
        self.folder, self.max_bytes = Path(folder), parse_size(max_bytes)
        self.hits = self.misses = self.damaged = self.evicted = self.unwritten = 0
        self._unmeasured: int | None = None

    def path(self, key: str) -> Path:
        """Where an entry lies."""
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def get(self, key: str) -> torch.Tensor | None:
        """The entry, or None."""
        from safetensors.torch import load

        try:
            data = self.path(key).read_bytes()
        except FileNotFoundError:
            self.misses += 1
            return None
        except OSError as error:
            self.misses += 1
            log.warning("%s cannot be read (%s): its features are computed again.", self.path(key), error.strerror)
            return None
        if hashlib.sha256(data[_DIGEST_SIZE:]).digest() == data[:_DIGEST_SIZE]:
            self.hits += 1
            return load(data[_DIGEST_SIZE:])["features"]
        self.damaged += 1
        self.misses += 1
        log.warning("%s is damaged: its features are computed again.", self.path(key))
        return None

    def put(self, key: str, features: torch.Tensor) -> None:
        """Write an entry; where there is one already, it is replaced as a whole.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        from safetensors.torch import save

        data, path = save({"features": features.detach().cpu().contiguous()}), self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{uuid.uuid4().hex}{_PARTIAL}")  # other users may read it, unlike a `tempfile`
        try:
            with partial.open("xb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        written = _DIGEST_SIZE + len(data) + (self._unmeasured or 0)
        if self._unmeasured is None or written * 64 >= self.max_bytes:
            self._evict()
            written = 0
        self._unmeasured = written

    def try_to_put(self, key: str, features: torch.Tensor) -> None:
        """Write an entry if it can be written; that the first one cannot is said in the log."""
        try:
            self.put(key, features)
        except OSError as error:
            self.unwritten += 1
            if self.unwritten == 1:
                log.warning(
                    "Features cannot be kept in %s (%s). They are computed each time until they can.", self.folder,
                    error.strerror or error,
                )

    def _evict(self) -> None:
        entries, total = [], 0
        for path in self.folder.glob(f"*/*{_SUFFIX}"):
            try:
                found = path.stat()
            except OSError:  # another process was faster
                continue
            entries.append((found.st_mtime_ns, path, found.st_size))
            total += found.st_size
        for path in self.folder.glob(f"*/*{_PARTIAL}"):
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
            except OSError:
                continue
        for _, path, size in sorted(entries):
            if total <= self.max_bytes:
                break
            try:
                path.unlink()
                self.evicted += 1
            except FileNotFoundError:
                pass
            except OSError:  # an entry of another user
                continue
            total -= size


class CachedTower:
    """A frozen tower that looks into a cache first. Each picture runs alone: no batch changes its features.

    Args:
        tower: the tower of a mixin.
        cache: where features are kept.
        name: of the tower's mixin, for errors.
        autocast: dtype that the tower runs in, as of the loop's `autocast`; None for its own.
    """

    def __init__(self, tower: Any, cache: FeatureCache, name: str = "image", autocast: str | None = None) -> None:
        self.tower, self.cache, self.name = tower, cache, name
        self.autocast = None if autocast is None else getattr(torch, autocast)
        self._digest: tuple[Any, str] = (None, "")

    def __call__(self, images: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """[m, 3, y, x] -> features [m, N, c] without gradients; further inputs [m, ...] as the tower's.

        Raises:
            ValueError: the tower is trained, or sharded over processes.
        """
        trained = [name for name, parameter in self.tower.named_parameters() if parameter.requires_grad]
        if trained:
            raise ValueError(
                f"The tower of mixin '{self.name}' is trained ({len(trained)} parameters, such as {trained[0]}), so "
                f"its features change: freeze mixins.{self.name}.tower.*, or do not cache them."
            )
        if any(hasattr(parameter, "placements") for parameter in self.tower.parameters()):
            raise ValueError(
                f"The tower of mixin '{self.name}' is sharded over processes, which must all run it or none: keep it "
                f"whole (DDP), or fill the cache in one process and give the features as images."
            )
        digest, found = self.digest(), []
        for index in range(len(images)):
            picture = {"images": images[index : index + 1]}
            picture |= {name: value[index : index + 1] for name, value in inputs.items()}
            key = _digest([*picture.items()], digest, images.device.type, str(self.autocast), torch.__version__)
            features = self.cache.get(key)
            if features is None:
                features = self._compute(picture)
                self.cache.try_to_put(key, features)
            found.append(features.to(images.device))
        return torch.cat(found)

    @torch.no_grad()
    def _compute(self, picture: Mapping[str, torch.Tensor]) -> torch.Tensor:
        dtype = next(self.tower.parameters()).dtype
        given = {**picture, "images": picture["images"].to(dtype)}
        with torch.autocast(given["images"].device.type, self.autocast, enabled=self.autocast is not None):
            features: torch.Tensor = self.tower(**given)
        return features if features.dim() == 3 else features[:, None]

    def digest(self) -> str:
        """SHA-256 of the tower's composition, options and weights; made anew when they have changed."""
        from mixformer.composition import describe

        state = self.tower.state_dict(keep_vars=True)
        version = [(name, id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in state.items()]
        if self._digest[0] != version:
            config = dataclasses.asdict(self.tower.config)
            composed = repr((type(self.tower).__qualname__, config, describe(self.tower)))
            self._digest = version, _digest(sorted(state.items()), composed)
        return self._digest[1]


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], *texts: str) -> str:
    """SHA-256 of named tensors, their shapes and dtypes, and of texts."""
    digest = hashlib.sha256(repr(texts).encode())
    for name, tensor in tensors:
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


class CachedFeaturesTask(WrappedTask):
    """Give the batches of another task with the features of frozen towers instead of pictures.

    Args:
        task: the other task; around a `PackedTask` or in it.
        folder: of the cache.
        max_bytes: bound of the cache, a number or a text such as `10GB`.
        mixins: names of the mixins whose towers are meant; None for all that have one.
        autocast: the dtype of the loop's `autocast`, if it has one.

    Raises:
        ValueError: when prepared: a mixin without a tower, or one whose adapter needs to know the tower's padding.
    """

    def __init__(
        self, task: Task, folder: str, max_bytes: int | str = "10GB", mixins: list[str] | None = None,
        autocast: str | None = None,
    ) -> None:
        super().__init__(task)
        self.cache, self.mixins, self.autocast = FeatureCache(folder, max_bytes), mixins, autocast
        self._towers: dict[str, tuple[CachedTower, tuple[str, ...]]] = {}

    def prepare(self, model: Any, processor: Any) -> None:
        super().prepare(model, processor)
        known = {
            name: mixin for name, mixin in model.mixins.items()
            if isinstance(mixin, ImageTokensMixin | CrossAttentionMixin) and mixin.tower is not None
        }
        self._towers = {}
        for name in known if self.mixins is None else self.mixins:
            if name not in known:
                has = ", ".join(known) or "none"
                raise ValueError(f"CachedFeaturesTask: mixin '{name}' has no tower; those that have one: {has}.")
            mixin = known[name]
            masked = isinstance(mixin, ImageTokensMixin) and mixin.adapter_config.takes_mask
            if masked and "pixel_attention_mask" in mixin.tower.declared:
                raise ValueError(
                    f"Mixin '{name}' has an adapter that must know which features are padding, which are not kept: "
                    f"leave it out of CachedFeaturesTask.mixins."
                )
            place = "cross_images" if isinstance(mixin, CrossAttentionMixin) else "images"
            others = tuple(other for other in mixin.tower.declared if other != "images")
            self._towers[place] = CachedTower(mixin.tower, self.cache, name, self.autocast), others

    def batches(self) -> Iterator[Batch]:
        return map(self._with_features, self.task.batches())

    def validation(self) -> Iterable[Any] | None:
        batches = self.task.validation()
        return None if batches is None else _Mapped(self._with_features, batches)

    def _with_features(self, batch: Batch) -> Batch:
        made, used = dict(batch), set[str]()
        for place, (tower, others) in self._towers.items():
            if batch.get(place) is not None:
                inputs = {name: batch[name] for name in others if batch.get(name) is not None}
                made[place] = tower(batch[place], **inputs)
                used |= inputs.keys()
        return {name: value for name, value in made.items() if name not in used}

    def finish(self, model: Any) -> None:
        self._towers = {}
        super().finish(model)


class _Mapped:
    """An iterable that can be gone through as often as what it is made of."""

    def __init__(self, function: Any, items: Iterable[Any]) -> None:
        self.function, self.items = function, items

    def __iter__(self) -> Iterator[Any]:
        return map(self.function, self.items)
