"""Properties that every composition must have, checked on anyone's mixin.

A new mixin is tested in three lines::

    from mixformer.testing import check_mixin

    def test_my_mixin():
        check_mixin(lambda: MyMixin(rank=4))
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mixformer.cache import KVCache
from mixformer.config import TransformerConfig
from mixformer.mixin import BaseMixin
from mixformer.mixins import (
    CrossAttentionMixin,
    ImageTokensMixin,
    VisionExpertAttentionMixin,
    VisionExpertFCMixin,
)
from mixformer.model import BaseModel

Row = dict[str, Any]
_VISION = (ImageTokensMixin, CrossAttentionMixin, VisionExpertAttentionMixin, VisionExpertFCMixin)
_TAIL = 4  # text tokens after the last image of every row


class Report(dict[str, "float | str"]):
    """{property: worst scaled difference, or why it does not apply}; prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        shown = {key: value if isinstance(value, str) else f"{value:.1e}" for key, value in self.items()}
        return "\n".join(f"{key:<{width}}  {value}" for key, value in shown.items())


def check_mixin(
    make_mixin: Callable[[], BaseMixin],
    model: BaseModel | Callable[[], BaseModel] | None = None,
    *,
    name: str | None = None,
    layers: Sequence[int] | None = None,
    replacing: str | None = None,
    extra_inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None,
    compile: bool = False,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Report:
    """Check every property of a composition with a mixin in it, on small random inputs.

    Bit for bit: adding and deleting restores keys, hooks and outputs; a failed add changes nothing; save and
    load, deepcopy and pickle round-trip; text alone gives what the language model gives; frozen tensors survive
    training. To rounding: cached equals uncached for every chunking; padded and mixed batches equal their rows;
    checkpointed gradients equal plain ones; adjacent images stay two; compiled equals eager. Gradients reach every
    trainable parameter.

    Example:
        >>> from mixformer.mixins import PrefixTuningMixin
        >>> from mixformer.testing import check_mixin
        >>> report = check_mixin(lambda: PrefixTuningMixin(num_prefix=3))
        >>> report["a padded batch equals its rows"] < 1e-5
        True

    Args:
        make_mixin: makes a new mixin at every call, always with the same options.
        model: a small fp32 model (never changed) or a function that makes one; a tiny CogAgent by default.
        name: the mixin's name in the model; `replacing`, or "checked", by default.
        layers: its layer scope, as of `add_mixin`.
        replacing: a mixin of the model to take out first, when the new one does the same job.
        extra_inputs: [1, s] token ids of a row (of a tower, the picture [1, 3, y, x]) -> its further forward inputs,
            [1, ...] each.
        compile: check `torch.compile(fullgraph=True)` as well, which takes seconds.
        tolerance: for what holds up to rounding, relative to the largest value.
        seed: of the inputs and of the jitter that moves all parameters off zero and one.

    Returns:
        {property: worst difference}, or the reason where a property does not apply.

    Raises:
        AssertionError: a property does not hold; the sentence names it.
    """
    if isinstance(model, BaseModel):
        base = copy.deepcopy(model)
    else:
        base = tiny_model("cogagent") if model is None else model()
    if replacing is not None:
        base.del_mixin(replacing)
    jitter(base, seed)
    base.eval()
    return _Check(
        make_mixin, base, name or replacing or "checked", layers, extra_inputs, compile, tolerance, seed
    ).run()


def tiny_model(kind: str = "cogagent", **changes: Any) -> BaseModel:
    """A random model of a few thousand parameters: `llama`, `cogvlm`, `cogvlm2` or `cogagent`.

    Args:
        kind: which one. `cogvlm2` has grouped heads, downsampled image tokens and expert biases.
        **changes: config options to change.

    Raises:
        ValueError: another kind.
    """
    from models.cogagent import CogAgentConfig
    from models.cogvlm import CogVLMConfig
    from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig
    from models.llama import LLaMAConfig

    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "inner_hidden_size": 40,
    }
    width = {"hidden_size": 16, "num_heads": 2, "inner_hidden_size": 24}
    tower = EVA2CLIPEConfig(num_layers=1, image_size=28, **width)  # type: ignore[arg-type]
    from mixformer.connectors.glu import GLUAdapterConfig

    configs: dict[str, Callable[[], TransformerConfig]] = {
        "llama": lambda: LLaMAConfig(**{**sizes, **changes}),
        "cogvlm": lambda: CogVLMConfig(**{**sizes, "rope_tables": "fp32", "vision": tower, **changes}),
        "cogvlm2": lambda: CogVLMConfig(
            **{
                **sizes,
                "rope_tables": "fp32",
                "vision": tower,
                "num_kv_heads": 2,
                "expert_qkv_bias": True,
                "adapter": GLUAdapterConfig(downsample=2, inner_hidden_size=40),
                **changes,
            }
        ),
        "cogagent": lambda: CogAgentConfig(
            **{
                **sizes,
                "rope_tables": "fp32",
                "vision": tower,
                "cross_compute_size": 24,
                "cross_vision": EVA2CLIPLConfig(
                    num_layers=2,
                    num_layers_run=1,
                    image_size=42,
                    stored_head_size=8,
                    **width,  # type: ignore[arg-type]
                ),
                **changes,
            }
        ),
    }
    if kind not in configs:
        raise ValueError(f"There is no tiny model '{kind}'; choose one of {', '.join(configs)}.")
    return configs[kind]().build(generator=torch.Generator().manual_seed(0))


def jitter(module: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Add noise to all parameters, so that nothing is zero or one by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def sample_row(
    model: BaseModel,
    num_images: int = 0,
    num_tokens: int = 8,
    generator: torch.Generator | None = None,
    gap: bool = False,
) -> Row:
    """Random forward inputs of one row: a text token, images if the model takes any, and text.

    Args:
        model: decides which inputs there are.
        num_images: spans in the row.
        num_tokens: text tokens.
        generator: of all values.
        gap: put one text token between images, which otherwise touch.
    """

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    image, cross = _of_type(model, ImageTokensMixin), _of_type(model, CrossAttentionMixin)
    types: list[int] = [0]
    if image is not None:
        for index in range(num_images):
            types.extend([0] * bool(gap and index))
            types.extend([1] * (image.num_features + 2 * image.marks))
    num_gaps = max(num_images - 1, 0) if gap and image is not None else 0
    types += [0] * (num_tokens - 1 - num_gaps)
    ids = torch.randint(model.config.vocab_size, (1, len(types)), generator=generator)
    row: Row = {"input_ids": ids}
    if image is not None and num_images:
        side = image.tower_config.image_size
        row |= {"token_type_ids": torch.tensor([types]), "images": random(num_images, 3, side, side)}
    if cross is not None and num_images:
        side = cross.tower_config.image_size
        row["cross_images"] = random(num_images if image is not None else 1, 3, side, side)
    return row


def collate(rows: Sequence[Row], side: str = "left") -> Row:
    """One batch of rows, padded on one side; images one after another, in the order of the rows."""
    length = max(row["input_ids"].shape[1] for row in rows)
    batch: Row = {
        "attention_mask": torch.stack([_pad(torch.ones_like(r["input_ids"]), length, side)[0] for r in rows])
    }
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = []
        for row in rows:
            ids = row["input_ids"]
            part = row.get(name)
            if part is None and name == "token_type_ids":
                part = torch.zeros_like(ids)
            if part is not None:
                parts.append(_pad(part, length, side) if part.shape[:2] == ids.shape else part)
        batch[name] = torch.cat(parts)
    return batch


def _pad(x: torch.Tensor, length: int, side: str) -> torch.Tensor:
    padding = x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])
    return torch.cat([padding, x] if side == "left" else [x, padding], dim=1)


def _of_type(model: BaseModel, kind: type) -> Any:
    return next((mixin for mixin in model.mixins.values() if isinstance(mixin, kind)), None)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    difference = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    return difference if difference == difference else float("inf")


class _Check:
    """One run of `check_mixin`: the bare model, and what is known about it."""

    def __init__(
        self,
        make_mixin: Callable[[], BaseMixin],
        base: BaseModel,
        name: str,
        layers: Sequence[int] | None,
        extra_inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None,
        compile: bool,
        tolerance: float,
        seed: int,
    ) -> None:
        self.make_mixin, self.base, self.name, self.layers = make_mixin, base, name, layers
        self.extra_inputs, self.compile, self.tolerance, self.seed = extra_inputs, compile, tolerance, seed
        self.is_tower = not base.config.vocab_size
        self.report = Report()
        self.what = type(make_mixin()).__name__

    def run(self) -> Report:
        bare = self.rows(self.base, (0, 1))
        self.model = copy.deepcopy(self.base)
        self.add(self.model)
        self.batch = self.together(self.rows(self.model, (0, 1, 2)))
        with torch.no_grad():
            self.expected = self.model(**self.batch)
            if not torch.isfinite(self.expected).all():
                raise AssertionError(f"{self.what}: the outputs are not finite.")
            self.check_delete(bare)
            self.check_failed_add(bare)
            self.check_save()
            self.check_copies()
            self.check_text_only()
        self.check_frozen()
        with torch.no_grad():
            self.check_cache()
            self.check_padding()
            self.check_mixed()
            self.check_adjacent()
        self.check_gradients()
        self.check_compile()
        return self.report

    # ---------------------------------------------------------------- helpers

    def add(self, model: BaseModel) -> Any:
        mixin = model.add_mixin(self.name, self.make_mixin(), layers=self.layers)
        jitter(mixin, self.seed + 1)
        for layer in model.transformer.layers:
            if self.name in layer.mixins:
                jitter(layer.mixins[self.name], self.seed + 2 + layer.index)
        return mixin

    def rows(
        self, model: BaseModel, images: Sequence[int], lengths: Sequence[int] = (), gap: bool = False
    ) -> list[Row]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.is_tower:
            patches = next((m for m in model.mixins.values() if hasattr(m, "image_size")), None)
            side = getattr(patches or self.make_mixin(), "image_size", 0)
            channels = getattr(patches or self.make_mixin(), "in_channels", 3)
            rows = [{"images": torch.randn(1, channels, side, side, generator=generator)} for _ in images]
            return [self.with_extra(model, row, row["images"]) for row in rows]
        rows = []
        for index, num_images in enumerate(images):
            num_tokens = lengths[index] if lengths else 8
            row = sample_row(model, num_images, num_tokens, generator, gap)
            rows.append(self.with_extra(model, row, row["input_ids"]))
        return rows

    def with_extra(self, model: BaseModel, row: Row, main: torch.Tensor) -> Row:
        given = {} if self.extra_inputs is None else self.extra_inputs(main)
        return row | {name: value for name, value in given.items() if name in model.declared}

    def together(self, rows: list[Row], side: str = "left") -> Row:
        if self.is_tower:
            return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return collate(rows, side)

    def exact(self, label: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for found, expected in pairs:
            if found.shape != expected.shape or not torch.equal(found, expected):
                raise AssertionError(
                    f"{self.what}: {label} - it must hold bit for bit; the difference is "
                    f"{_difference(found.double(), expected.double()):.1e}."
                )
        self.report[label] = 0.0

    def close(self, label: str, pairs: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        worst = max(
            ((_difference(found, expected), where) for where, found, expected in pairs), default=(0.0, "")
        )
        if worst[0] > self.tolerance:
            raise AssertionError(
                f"{self.what}: {label} - {worst[1]} differs by {worst[0]:.1e} of the largest value; "
                f"{self.tolerance:.0e} is allowed."
            )
        self.report[label] = worst[0]

    def skip(self, label: str, why: str) -> None:
        self.report[label] = f"does not apply: {why}"

    def state(self, model: BaseModel, batch: Row) -> tuple[list[Any], list[torch.Tensor]]:
        """What must not change: names first, tensors second."""
        tensors = dict(model.state_dict())
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        nested = [str(inner.hooks) for _, inner in model.nested_models()]
        composition = [str(model.hooks), nested, list(model.mixins), dict(model.scopes)]
        names = [list(tensors), *composition, trained, model.training]
        output = model(**batch)
        return names, [*(tensor.clone() for tensor in tensors.values()), output, torch.random.get_rng_state()]

    def same_state(self, label: str, found: Any, expected: Any) -> None:
        parts = (
            "keys",
            "hooks",
            "hooks of nested models",
            "mixins",
            "scopes",
            "trainable parameters",
            "training mode",
        )
        for part, a, b in zip(parts, found[0], expected[0], strict=True):
            if a != b:
                raise AssertionError(f"{self.what}: {label} - the {part} changed from {b} to {a}.")
        self.exact(label, list(zip(found[1], expected[1], strict=True)))

    # ---------------------------------------------------------------- bit for bit

    def state_before(
        self, label: str, model: BaseModel, bare: list[Row]
    ) -> tuple[list[Any], list[torch.Tensor]] | None:
        """The state without the mixin, or None (and a note in the report) if the model needs it to run."""
        try:
            return self.state(model, self.together(bare))
        except (ValueError, TypeError, KeyError) as error:
            self.skip(label, f"the model does not run without it ({error})")
            return None

    def check_delete(self, bare: list[Row]) -> None:
        label = "adding and deleting restores keys, hooks and outputs"
        model = copy.deepcopy(self.base)
        before = self.state_before(label, model, bare)
        if before is None:
            return
        mixin = self.add(model)
        within = model(**self.batch)
        if hasattr(mixin, "merge"):
            mixin.merge(model)
        removed = model.del_mixin(self.name)
        if removed is not mixin or mixin.name:
            raise AssertionError(
                f"{self.what}: {label} - del_mixin must return the mixin, free to be added again."
            )
        self.same_state(label, self.state(model, self.together(bare)), before)
        model.add_mixin(self.name, mixin, layers=self.layers)
        self.exact("a deleted mixin can be added again with its weights", [(model(**self.batch), within)])

    def check_failed_add(self, bare: list[Row]) -> None:
        label = "a failed add changes nothing"
        model = copy.deepcopy(self.base)
        before = self.state_before(label, model, bare)
        if before is None:
            return
        for method in ("build", "build_layer", "on_attach"):
            mixin = self.make_mixin()
            has_parts = type(mixin).build_layer is not BaseMixin.build_layer and len(model.transformer.layers)
            if method == "build_layer" and not has_parts:
                continue
            mixin.__dict__[method] = _failing(getattr(mixin, method))
            try:
                model.add_mixin(self.name, mixin, layers=self.layers)
            except _Failure:
                pass
            else:
                raise AssertionError(f"{self.what}: {label} - an exception in {method} was swallowed.")
            self.same_state(label, self.state(model, self.together(bare)), before)
            del mixin.__dict__[method]
            if mixin.name:
                raise AssertionError(f"{self.what}: {label} - the mixin still thinks it belongs to a model.")
        model.add_mixin(self.name, self.make_mixin(), layers=self.layers)
        with_it = self.state(model, self.batch)
        refused = [self.name]
        if "replace" in self.make_mixin().hooks().values():
            refused.append(self.name + "_again")
        for other in refused:
            try:
                model.add_mixin(other, self.make_mixin(), layers=self.layers)
            except ValueError:
                self.same_state(label, self.state(model, self.batch), with_it)
            else:
                raise AssertionError(f"{self.what}: {label} - a second one was accepted as '{other}'.")

    def check_save(self) -> None:
        label = "saving and loading gives the same composition and outputs"
        from mixformer.checkpoint import from_pretrained, save_pretrained

        kind = type(self.model.get_mixin(self.name))
        trusted = kind.__module__.split(".")[0] in ("mixformer", "models")
        if not trusted and ("<locals>" in kind.__qualname__ or kind.__module__ == "__main__"):
            self.skip(
                label, f"{kind.__qualname__} is not defined at the top of a module, so it cannot be imported"
            )
            return
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(self.model, folder)
            again = from_pretrained(folder, mixins=None if trusted else {self.name: kind})
        again.eval()
        self.same_state(label, self.state(again, self.batch), self.state(self.model, self.batch))

    def check_copies(self) -> None:
        label = "deepcopy gives the same model"
        expected = self.state(self.model, self.batch)
        self.same_state(label, self.state(copy.deepcopy(self.model), self.batch), expected)
        label = "pickle gives the same model"
        if any(
            "<locals>" in type(part).__qualname__ for part in (self.model, self.model.get_mixin(self.name))
        ):
            self.skip(label, "the class is defined inside a function, where pickle cannot find it")
            return
        self.same_state(label, self.state(pickle.loads(pickle.dumps(self.model)), self.batch), expected)

    def check_text_only(self) -> None:
        label = "text alone gives what the language model gives"
        vision = [
            name
            for name, mixin in self.model.mixins.items()
            if isinstance(mixin, _VISION) or {"images", "cross_images"}.intersection(mixin.inputs)
        ]
        if self.is_tower or not vision:
            self.skip(label, "the model takes no images")
            return
        adapted = self.model.get_mixin(self.name).depends_on().intersection(vision)
        if adapted:
            self.skip(label, f"the mixin builds on {', '.join(sorted(adapted))}")
            return
        language = copy.deepcopy(self.model)
        for name in reversed(vision):
            language.del_mixin(name)
        row = self.rows(self.model, (0,))[0]
        expected = language(
            **{name: value for name, value in row.items() if name in (*language.declared, "input_ids")}
        )
        self.exact(label, [(self.model(**row), expected)])

    def check_frozen(self) -> None:
        label = "frozen tensors stay as they are while the mixin learns"
        model = copy.deepcopy(self.model)
        own = {id(p) for p in model.get_mixin(self.name).parameters() if p.requires_grad}
        for layer in model.transformer.layers:
            if self.name in layer.mixins:
                own |= {id(p) for p in layer.mixins[self.name].parameters() if p.requires_grad}
        if not own:
            self.skip(label, "the mixin has no trainable parameters")
            return
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
        frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
        learned = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss = torch.stack([result.square().mean() for result in self.results(model)]).sum()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
        now = dict(model.named_parameters())
        self.exact(label, [(now[key].detach(), value) for key, value in frozen.items()])
        if all(torch.equal(now[key].detach(), value) for key, value in learned.items()):
            raise AssertionError(f"{self.what}: {label} - but nothing in it changed, so it does not learn.")

    # ---------------------------------------------------------------- to rounding

    def check_cache(self) -> None:
        label = "cached equals uncached at every step and chunking"
        if self.is_tower or not self.model.config.causal or self.model.whole_sequence:
            self.skip(label, "the model does not run token by token")
            return
        num_rows, length = self.batch["input_ids"].shape
        valid = self.batch["attention_mask"].bool()
        pairs = []
        for static in (False, True):
            for chunks in ([length], [length - _TAIL] + [1] * _TAIL, [length - _TAIL, _TAIL - 1, 1]):
                cache = KVCache(self.model, num_rows, length + 1, static=static)
                found, start = [], 0
                for size in chunks:
                    found.append(self.model(**self.chunk(start, size), cache=cache))
                    start += size
                kind = "static" if static else "growing"
                pairs.append(
                    (f"a {kind} cache with chunks {chunks}", torch.cat(found, 1)[valid], self.expected[valid])
                )
        self.close(label, pairs)

    def chunk(self, start: int, size: int) -> Row:
        shape = self.batch["input_ids"].shape
        part = {}
        for name, value in self.batch.items():
            if value.shape[:2] == shape:
                if name != "token_type_ids" or start == 0:
                    part[name] = value[:, start : start + size]
            elif start == 0 or name not in ("images", "cross_images", "prefix_lengths"):
                part[name] = value
        return part

    def check_padding(self) -> None:
        label = "a padded batch equals its rows"
        if self.is_tower:
            self.skip(label, "towers take no padding")
            return
        rows = self.rows(self.model, (1, 0, 2), (7, 12, 6))
        alone = [self.model(**row)[0] for row in rows]
        pairs = []
        for side in ("left", "right"):
            batch = collate(rows, side)
            found = self.model(**batch)
            for index, (expected, mask) in enumerate(zip(alone, batch["attention_mask"].bool(), strict=True)):
                kept = found[index] if expected.dim() < 2 else found[index][mask]
                pairs.append((f"row {index}, padded on the {side},", kept, expected))
        self.close(label, pairs)

    def check_mixed(self) -> None:
        label = "a batch of rows with no, one and several images equals its rows"
        rows = self.rows(self.model, (0, 1, 2))
        if not self.is_tower and _of_type(self.model, ImageTokensMixin) is not None:
            size = rows[1]["input_ids"].shape[1] - rows[0]["input_ids"].shape[1]
            rows = self.rows(self.model, (0, 1, 2, 0), (8 + 2 * size, 8 + size, 8, 8 + 2 * size))
        batch = self.together(rows)
        found = self.model(**batch)
        self.close(label, [(f"row {i}", found[i], self.model(**row)[0]) for i, row in enumerate(rows)])

    def check_adjacent(self) -> None:
        label = "two adjacent images equal the same two apart, in their own order"
        if self.is_tower or _of_type(self.model, ImageTokensMixin) is None:
            self.skip(label, "the model takes no images in its sequence")
            return
        added = {"position_embedding_forward", "embedding_norm_forward"}
        others = [mixin for mixin in self.model.mixins.values() if not isinstance(mixin, ImageTokensMixin)]
        if self.model.config.positions == "learned" or any(added.intersection(mixin.hooks()) for mixin in others):
            self.skip(label, "positions are part of the embeddings")
            return
        apart, adjacent = (self.rows(self.model, (2,), (8,), gap)[0] for gap in (True, False))
        adjacent["images"], pictures = apart["images"], {}
        if "cross_images" in adjacent:
            adjacent["cross_images"] = apart["cross_images"]
        swapped = {**adjacent, "images": adjacent["images"].flip(0)}
        for key, row in (("apart", apart), ("adjacent", adjacent), ("swapped", swapped)):
            embeddings = self.model.run(**row, hidden_layers=("embeddings",)).hidden["embeddings"]
            pictures[key] = embeddings[row["token_type_ids"].bool()].unflatten(0, (2, -1))
        expected = pictures["apart"]
        if torch.equal(expected[0], expected[1]):
            raise AssertionError(f"{self.what}: {label} - different pictures give the same features.")
        found = [
            ("as given", pictures["adjacent"], expected),
            ("swapped", pictures["swapped"].flip(0), expected),
        ]
        self.close(label, found)

    def results(self, model: BaseModel) -> list[torch.Tensor]:
        """The logits, and what mixins give beside them."""
        out = model.run(**self.batch)
        return [out.logits, *(result for result in out.outputs.values() if result.is_floating_point())]

    def gradients(self, model: BaseModel) -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        generator = torch.Generator().manual_seed(self.seed)
        found = [(result * torch.randn(result.shape, generator=generator)).mean() for result in self.results(model)]
        torch.stack(found).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def check_gradients(self) -> None:
        model = copy.deepcopy(self.model)
        plain = self.gradients(model)
        label = "gradients reach every trainable parameter"
        for name, gradient in plain.items():
            if gradient is None or not torch.isfinite(gradient).all() or not gradient.any():
                problem = "no" if gradient is None else "a zero" if not gradient.any() else "a non-finite"
                raise AssertionError(f"{self.what}: {label} - {name} gets {problem} gradient.")
        self.report[label] = 0.0
        for inner in [model, *(nested for _, nested in model.nested_models())]:
            inner.config.checkpoint_activations = True
        recomputed = self.gradients(model)
        pairs = [
            (name, gradient, plain[name])
            for name, gradient in recomputed.items()
            if gradient is not None and plain[name] is not None
        ]
        self.close("checkpointed gradients equal plain ones", pairs)  # type: ignore[arg-type]

    def check_compile(self) -> None:
        label = "compiled equals eager"
        if not self.compile:
            self.skip(label, "not asked for (compile=True)")
            return
        torch._dynamo.reset()
        compiled = torch.compile(self.model, fullgraph=True, backend="aot_eager")
        inputs = {name: value for name, value in self.batch.items() if name in self.model.declared}
        with torch.no_grad():
            plan = None if self.is_tower else self.model.plan(**self.batch, dynamic=True)
            found = compiled(self.batch.get("input_ids"), plan=plan, **inputs)
        self.close(label, [("the output", found, self.expected)])


class _Failure(Exception):
    pass


def _failing(method: Callable[..., Any]) -> Callable[..., Any]:
    def fail(where: Any) -> Any:
        method(where)
        raise _Failure

    return fail
