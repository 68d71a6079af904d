"""BaseModel: a backbone and a list of named mixins that can be changed while it lives."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from mixformer.cache import KVCache
from mixformer.config import TransformerConfig
from mixformer.context import Context
from mixformer.hooks import (
    HOOKS,
    LAYER_HOOKS,
    MODEL_HOOKS,
    SITE_HOOKS,
    Claim,
    HookTable,
    did_you_mean,
    ordered_claims,
    resolve,
    resolve_site,
)
from mixformer.masks import Causal, Full, Padding, lower
from mixformer.mixin import BaseMixin
from mixformer.sites import Site, layer_sites, model_sites
from mixformer.transformer import LAYER_DEFAULTS, Layer, Transformer


@dataclass
class Output:
    """What a forward gives.

    Attributes:
        logits: [b, s, v] ([b, 1, v] with `last_only`; the features of a tower).
        hidden: {layer index: [b, s, h] after that layer} for the layers asked for; also "embeddings" and "final".
        losses: auxiliary losses of mixins.
    """

    logits: torch.Tensor
    hidden: dict[int | str, torch.Tensor] = field(default_factory=dict)
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


class BaseModel(nn.Module):
    """A transformer whose behaviour is its backbone's plus its mixins'.

    Subclasses name their config class in `Config` and add their mixins in `compose`.

    Args:
        config: sizes and options.
        device: where parameters are made; `meta` makes shapes only.
        dtype: of parameters; torch's default dtype if None.
        generator: gives the seed of all initial weights. Without one the seed is `torch.initial_seed()`, which is
            read and not advanced. No other random state is touched.
    """

    Config: ClassVar[type[TransformerConfig]] = TransformerConfig
    has_own_sites: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in vars(cls):
            cls.Config.model_class = cls

    def __init__(
        self,
        config: TransformerConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = self.Config() if config is None else config
        self.mixins: Any = nn.ModuleDict()
        self.scopes: dict[str, list[int] | None] = {}
        if generator is None:
            self._seed = torch.initial_seed()
        else:
            self._seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self._device = torch.device(device or torch.get_default_device())
        self._dtype = dtype or torch.get_default_dtype()
        with self._building("transformer"):
            self.transformer = Transformer(self.config)
        self._resolve()
        self.compose()

    def compose(self) -> None:
        """Add the mixins that make this model. The plain backbone has none."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), self._device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), self._dtype)

    # ---------------------------------------------------------------- mixins

    def add_mixin(self, name: str, mixin: BaseMixin, layers: Iterable[int] | None = None) -> BaseMixin:
        """Add a mixin; if anything is wrong, nothing is changed.

        Args:
            name: its name, also its parameters' key; or a path into a nested model, "image.tower/lora".
            mixin: an instance that no model has.
            layers: layers that its layer hooks and per-layer parameters are limited to; None for all.

        Returns:
            the mixin.

        Raises:
            ValueError: the name is taken or no identifier, the mixin belongs to a model, `layers` are out of range
                or mean nothing to it, or another mixin replaces the same hook.
        """
        owner, name = self._owner(name)
        owner._check_name(name)
        if name in owner.mixins:
            raise ValueError(
                f"{type(owner).__name__} already has a mixin '{name}' ({type(owner.mixins[name]).__name__}). "
                f"Take another name, or swap it with model.replace_mixin('{name}', ...)."
            )
        owner._install(name, mixin, layers, None)
        return mixin

    def del_mixin(self, name: str) -> BaseMixin:
        """Take a mixin out and return it. It keeps its parameters and can be added again.

        Raises:
            ValueError: there is no such mixin, or another mixin depends on it.
        """
        owner, name = self._owner(name)
        mixin = owner.get_mixin(name)
        owner._check_independent(name)
        mixin.on_detach(owner)
        owner._remove(name)
        owner._resolve()
        return mixin

    def replace_mixin(self, name: str, mixin: BaseMixin, layers: Iterable[int] | None = None) -> BaseMixin:
        """Swap a mixin for another, which takes its name and its place in every chain; returns the old one.

        Args:
            name: of the mixin to swap, or a path into a nested model.
            mixin: the new one.
            layers: layers of the new one; None keeps the old one's.

        Raises:
            ValueError: as of `add_mixin` and `del_mixin`; nothing is changed then.
        """
        owner, name = self._owner(name)
        old = owner.get_mixin(name)
        owner._check_independent(name)
        owner._install(name, mixin, owner.scopes[name] if layers is None else layers, old)
        return old

    def get_mixin(self, name: str) -> BaseMixin:
        """The mixin of that name (or path).

        Raises:
            ValueError: there is none.
        """
        owner, name = self._owner(name)
        if name not in owner.mixins:
            known = list(owner.mixins)
            raise ValueError(
                f"{type(owner).__name__} has no mixin '{name}'.{did_you_mean(name, known)} It has: "
                f"{', '.join(known) or 'none'}."
            )
        mixin = owner.mixins[name]
        assert isinstance(mixin, BaseMixin)
        return mixin

    def nested_models(self) -> Iterator[tuple[str, BaseModel]]:
        """(path, model) of the models that mixins hold, such as ("image.tower", ...), outermost first."""
        for name, mixin in self.mixins.items():
            for path, module in mixin.named_modules():
                if isinstance(module, BaseModel):
                    yield f"{name}.{path}", module

    def _owner(self, path: str) -> tuple[BaseModel, str]:
        *outer, name = path.split("/")
        model: Any = self
        for part in outer:
            nested = {key: value for key, value in model.nested_models()}
            if part not in nested:
                raise ValueError(
                    f"'{path}': {type(model).__name__} has no nested model '{part}'.{did_you_mean(part, list(nested))} "
                    f"It has: {', '.join(nested) or 'none'}."
                )
            model = nested[part]
        return model, name

    def _check_name(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or hasattr(nn.ModuleDict, name) or (hasattr(self.mixins, name) and (
            name not in self.mixins
        )):
            raise ValueError(f"'{name}' cannot name a mixin. Take a word of letters, digits and underscores.")

    def _check_independent(self, name: str) -> None:
        for other, mixin in self.mixins.items():
            if other != name and name in mixin.depends_on():
                raise ValueError(f"Mixin '{other}' builds on '{name}'. Remove it first: model.del_mixin('{other}').")

    def _scope(self, name: str, mixin: BaseMixin, layers: Iterable[int] | None) -> list[int] | None:
        if layers is None:
            return None
        scope = sorted(set(layers))
        outside = [index for index in scope if not 0 <= index < self.config.num_layers]
        if outside or not scope:
            raise ValueError(
                f"layers={scope} of mixin '{name}': the layers of {type(self).__name__} are 0 to "
                f"{self.config.num_layers - 1}."
            )
        if not mixin.has_layer_part():
            raise ValueError(
                f"layers={scope} mean nothing to '{name}': {type(mixin).__name__} has no layer hooks and no "
                f"per-layer parameters. Leave `layers` out."
            )
        return scope

    def _install(self, name: str, mixin: BaseMixin, layers: Iterable[int] | None, old: BaseMixin | None) -> None:
        if not isinstance(mixin, BaseMixin):
            raise TypeError(f"'{name}' must be a BaseMixin instance, not {type(mixin).__name__}.")
        owner = mixin.name
        if owner:
            raise ValueError(
                f"This {type(mixin).__name__} already belongs to a model, as '{owner}'. Make another one: "
                f"{type(mixin).__name__}(**mixin.options)."
            )
        scope = self._scope(name, mixin, layers)
        others = [(key, value) for key, value in self.mixins.items() if key != name]
        self._check_claims([*others, (name, mixin)], {**self.scopes, name: scope})
        indices = range(self.config.num_layers) if scope is None else scope
        kept = {key: dict(value) if isinstance(value, dict) else value for key, value in mixin.__dict__.items()}
        place = list(self.mixins).index(name) if old is not None else len(self.mixins)
        parts = old_parts = None
        old_scope = self.scopes.get(name)
        try:
            parts = self._build_parts(name, mixin, indices)
            if old is not None:
                old.on_detach(self)
                old_parts = self._remove(name)
            self._put(name, mixin, parts, scope, place)
            self._resolve()
            mixin.on_attach(self)
        except BaseException:
            if name in self.mixins and self.mixins[name] is mixin:
                self._remove(name)
            mixin.__dict__.clear()
            mixin.__dict__.update(kept)
            if old is not None and old_parts is not None:
                self._put(name, old, old_parts, old_scope, place)
                self._resolve()
                old.on_attach(self)
            else:
                self._resolve()
            raise

    def _build_parts(self, name: str, mixin: BaseMixin, indices: Iterable[int]) -> dict[int, nn.Module]:
        indices = list(indices)
        built_for = (indices, self.config)
        stored = mixin.__dict__.get("_stored")
        if stored is not None:
            if stored[0] != built_for:
                raise ValueError(
                    f"This {type(mixin).__name__} was built for other layers or another configuration. Make a new "
                    f"one: {type(mixin).__name__}(**mixin.options)."
                )
            mixin.to(self.device, self.dtype)
            return {index: part.to(self.device, self.dtype) for index, part in stored[1].items()}
        parts = {}
        mixin.name = name
        with self._building(name):
            mixin.build(self)
            for index in indices:
                layer = self.transformer.layers[index]
                assert isinstance(layer, Layer)
                part = mixin.build_layer(layer)
                if part is not None:
                    parts[index] = part.requires_grad_(False) if index >= self.config.layers_run else part
        mixin.train(self.training)
        for part in parts.values():
            part.train(self.training)
        return parts

    def _put(
        self, name: str, mixin: BaseMixin, parts: dict[int, nn.Module], scope: list[int] | None, place: int
    ) -> None:
        mixin.name = name
        mixin.__dict__["_stored"] = None
        _insert(self.mixins, name, mixin, place)
        order = list(self.mixins)
        for index, part in parts.items():
            mixins = self.transformer.layers[index].mixins
            _insert(mixins, name, part, sum(order.index(other) < place for other in mixins))
        self.scopes = {key: scope if key == name else self.scopes[key] for key in self.mixins}

    def _remove(self, name: str) -> dict[int, nn.Module]:
        mixin: BaseMixin = self.mixins.pop(name)
        scope = self.scopes.pop(name)
        parts = {}
        for index, layer in enumerate(self.transformer.layers):
            if name in layer.mixins:
                parts[index] = layer.mixins.pop(name)
        indices = list(range(self.config.num_layers) if scope is None else scope)
        mixin.name = ""
        mixin.__dict__["_stored"] = ((indices, self.config), parts)
        return parts

    @contextmanager
    def _building(self, what: str) -> Iterator[None]:
        digest = hashlib.sha256(f"{self._seed}:{what}".encode()).digest()
        dtype = torch.get_default_dtype()
        seed = int.from_bytes(digest[:7], "big")
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), torch.device(self.device):
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            torch.set_default_dtype(self.dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(dtype)

    # ---------------------------------------------------------------- hooks

    def _in_scope(self, mixins: Sequence[Claim], scopes: dict[str, list[int] | None], index: int) -> list[Claim]:
        chosen = []
        for name, mixin in mixins:
            scope = scopes[name]
            if scope is None or index in scope:
                chosen.append((name, mixin))
        return chosen

    def _check_claims(self, mixins: Sequence[Claim], scopes: dict[str, list[int] | None]) -> None:
        for hook in MODEL_HOOKS:
            ordered_claims(hook, mixins, "of the model")
        for index, layer in enumerate(self.transformer.layers):
            active = self._in_scope(mixins, scopes, index)
            for hook in LAYER_HOOKS:
                if hook not in SITE_HOOKS:
                    ordered_claims(hook, active, f"of layer {index}")
            for site in layer_sites(layer):
                self._site_claims(site, active, f"of site '{site.name}' in layer {index}")
        for site in model_sites(self):
            self._site_claims(site, mixins, f"of site '{site.name}'")

    @staticmethod
    def _site_claims(site: Site, mixins: Sequence[Claim], where: str) -> list[Claim]:
        hook = site.hook
        claims = [(name, mixin) for name, mixin in mixins if mixin.claims_site(hook, site)]
        return ordered_claims(hook, claims, where)

    def _resolve(self) -> None:
        mixins = [(name, mixin) for name, mixin in self.mixins.items() if isinstance(mixin, BaseMixin)]
        memo: dict[tuple[str, ...], Callable[..., Any]] = {}
        names: dict[tuple[str, str, str], list[int]] = {}

        def chain(hook: str, claims: list[Claim], default: Callable[..., Any], where: int | None) -> Any:
            key = (hook, *(name for name, _ in claims))
            if key not in memo:
                memo[key] = resolve(hook, claims, default)
            first = "" if claims and "replace" == type(claims[0][1]).hooks().get(hook) else "default"
            row = (hook, "", " <- ".join([first] * bool(first) + [name for name, _ in claims]))
            names.setdefault(row, []).extend([] if where is None else [where])
            return memo[key]

        model_chains = {
            hook: chain(hook, ordered_claims(hook, mixins, "of the model"), getattr(self.transformer, hook), None)
            for hook in MODEL_HOOKS
        }
        for index, layer in enumerate(self.transformer.layers):
            assert isinstance(layer, Layer)
            active = self._in_scope(mixins, self.scopes, index)
            layer.hooks = _LayerHooks()
            for hook in LAYER_DEFAULTS:
                claims = ordered_claims(hook, active, f"of layer {index}")
                setattr(layer.hooks, hook, chain(hook, claims, LAYER_DEFAULTS[hook], index))
            for site in layer_sites(layer):
                self._resolve_site(site, layer, active, names, index)
        for site in model_sites(self):
            self._resolve_site(site, None, mixins, names, None)
        self.whole_sequence = any(m.whole_sequence and "final_forward" in type(m).hooks() for _, m in mixins)
        self.declared = {name: key for key, mixin in mixins for name in mixin.inputs}
        rows = [(hook, _span(where, self.config.num_layers), text) for (hook, _, text), where in names.items()]
        order = list(HOOKS)
        self.hooks = HookTable(model_chains, sorted(rows, key=lambda row: order.index(row[0].split(" ")[0])))

    def _resolve_site(
        self, site: Site, layer: Layer | None, mixins: Sequence[Claim],
        names: dict[tuple[str, str, str], list[int]], index: int | None,
    ) -> None:
        claims = self._site_claims(site, mixins, f"of site '{site.name}'")
        site.module.hook = resolve_site(site.hook, site, layer, claims, site.module.plain)
        if claims:
            first = [] if type(claims[0][1]).hooks().get(site.hook) == "replace" else ["default"]
            row = (f"{site.hook} {site.name}", "", " <- ".join(first + [key for key, _ in claims]))
            names.setdefault(row, []).extend([] if index is None else [index])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._resolve()

    # ---------------------------------------------------------------- running

    def plan(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        dynamic: bool = False,
        **inputs: Any,
    ) -> Context:
        """Everything about a batch that integers tell: positions, mask, routes. `forward(..., plan=...)` takes it.

        A collator can do this outside a compiled graph; otherwise `forward` does it. Arguments as of `forward`.
        With `dynamic`, sizes that differ from batch to batch are marked, so that a few graphs of `torch.compile`
        serve all batches.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        unknown = [name for name in inputs if name not in self.declared]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no input '{unknown[0]}'.{did_you_mean(unknown[0], list(self.declared))} "
                f"Its mixins declare: {', '.join(self.declared) or 'none'}."
            )
        if attention_mask is not None:
            attention_mask = self._checked_mask(input_ids, attention_mask)
        ctx = Context(input_ids, attention_mask, position_ids, cache, given, self.declared)
        ctx.dynamic = dynamic
        if input_ids is not None:
            if input_ids.dim() != 2:
                raise ValueError(f"input_ids must be [b, s]; got shape {tuple(input_ids.shape)}.")
            ctx.position_steps = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        ctx.mask = Causal() if self.config.causal else Full()
        valid = attention_mask
        if cache is not None and input_ids is not None:
            cache.reserve(*input_ids.shape)
            valid = cache.mark(attention_mask, input_ids.shape[1])
        if valid is not None:
            ctx.mask = ctx.mask & Padding(valid)
        for mixin in self.mixins.values():
            mixin.plan(ctx)
        if ctx.position_ids is None and ctx.position_steps is not None:
            ctx.position_ids = (ctx.position_steps.cumsum(1) - 1).clamp_min(0)
            if cache is not None:
                ctx.position_ids = ctx.position_ids + cache.next_position[:, None]
        if dynamic:
            ctx.mark_dynamic()
        return ctx

    def _checked_mask(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor) -> torch.Tensor | None:
        if input_ids is None or attention_mask.shape != input_ids.shape:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(
                f"attention_mask marks padding and must have the shape of input_ids, {shape}; got "
                f"{tuple(attention_mask.shape)}. Other masks: wrap 'attention_mask_forward'."
            )
        mask = attention_mask.bool()
        return None if bool(mask.all()) else mask

    def run(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        plan: Context | None = None,
        last_only: bool = False,
        hidden_layers: Sequence[int | str] = (),
        **inputs: Any,
    ) -> Output:
        """Run the model and return more than logits.

        Args:
            input_ids: [b, s] token ids; None in towers.
            attention_mask: [b, s], marks padding only (True or 1 on real tokens).
            position_ids: [b, s]; by default they follow from `attention_mask` and the inputs.
            cache: where keys and values are kept; the tokens given come after those in it.
            plan: what `plan` returned for these arguments.
            last_only: logits of the last slot only.
            hidden_layers: layers whose output to return; "embeddings" and "final" (after the final norm) as well.
            **inputs: what the mixins declare.

        Raises:
            TypeError: an input that no mixin declares.
            ValueError: inputs that do not fit each other.
        """
        if plan is None:
            plan = self.plan(input_ids, attention_mask, position_ids, cache, **inputs)
        ctx = plan.started({name: value for name, value in inputs.items() if value is not None})
        for mixin in self.mixins.values():
            mixin.before_forward(ctx)
        hooks: Any = self.hooks
        hidden_states = hooks.word_embedding_forward(ctx.input_ids, ctx)
        num_tokens = hidden_states.shape[1]
        if ctx.position_ids is None:
            ctx.position_ids = torch.arange(num_tokens, device=hidden_states.device)[None]
        positions = hooks.position_embedding_forward(ctx.position_ids, ctx)
        if positions is not None:
            hidden_states = hidden_states + positions
        hidden_states = hooks.embedding_norm_forward(hidden_states, ctx)
        mask, cache = hooks.attention_mask_forward(ctx.mask, ctx), ctx.cache
        num_keys, offset = (num_tokens, 0) if cache is None else (cache.num_keys(num_tokens), cache.offset)
        ctx.mask = lower(mask, num_tokens, num_keys, offset, hidden_states.device)
        hidden: dict[int | str, torch.Tensor] = {"embeddings": hidden_states}
        for index in range(self.config.layers_run):
            layer = self.transformer.layers[index]
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                hidden_states = checkpoint(_run_apart, layer, hidden_states, ctx, use_reentrant=False)
            else:
                hidden_states = layer(hidden_states, ctx)
            if index in hidden_layers:
                hidden[index] = hidden_states
        if self.transformer.final_norm is not None:
            hidden_states = self.transformer.final_norm(hidden_states, ctx)
        hidden["final"] = hidden_states
        if last_only and not self.whole_sequence:
            hidden_states = hidden_states[:, -1:]
        logits = hooks.final_forward(hidden_states, ctx)
        if cache is not None:
            cache.advance(num_tokens, ctx.position_ids.amax(1) + 1)
        return Output(logits, {key: hidden[key] for key in hidden_layers if key in hidden}, ctx.losses)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        plan: Context | None = None,
        last_only: bool = False,
        **inputs: Any,
    ) -> torch.Tensor:
        """Logits [b, s, v]; arguments as of `run`."""
        return self.run(
            input_ids, attention_mask, position_ids, cache, plan=plan, last_only=last_only, **inputs
        ).logits


def _run_apart(layer: nn.Module, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
    """A layer with a context of its own: compiled checkpoints may not change what lies outside of them."""
    own = ctx.started(ctx.inputs)
    own.losses = ctx.losses
    return layer(hidden_states, own)


class _LayerHooks:
    """The resolved layer hooks of one layer."""

    __slots__ = tuple(LAYER_DEFAULTS)


def _insert(modules: nn.ModuleDict, name: str, module: nn.Module, place: int) -> None:
    items = list(modules.items())
    items.insert(place, (name, module))
    modules.clear()
    modules.update(dict(items))


def _span(indices: list[int], num_layers: int) -> str:
    if not indices:
        return "model"
    if len(indices) == num_layers:
        return "all layers"
    steps = {b - a for a, b in pairwise(indices)}
    if len(indices) > 2 and len(steps) == 1:
        step = steps.pop()
        return f"layers {indices[0]}-{indices[-1]}" + (f" step {step}" if step > 1 else "")
    return "layers " + ", ".join(str(index) for index in indices)


BaseModel.Config.model_class = BaseModel
