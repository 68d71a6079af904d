"""MixinHost: a model's list of mixins, changed as transactions, and the parameters and chains that follow from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn as nn

from mixformer.chains import Claim, HookTable, ordered_claims, resolve, resolve_site, shown_chain, shown_layers
from mixformer.config import TransformerConfig
from mixformer.hooks import HOOKS, LAYER_HOOKS, MODEL_HOOKS, SITE_HOOKS, did_you_mean
from mixformer.mixin import BaseMixin
from mixformer.sites import Site, layer_sites, model_sites
from mixformer.transformer import LAYER_DEFAULTS, Layer, Transformer


class MixinHost(nn.Module):
    """The backbone and its named mixins. `BaseModel` adds running them.

    Args:
        config: sizes and options.
        device: where parameters are made.
        dtype: of parameters.
        seed: of all initial weights; each part derives its own from it and its name.
    """

    has_own_sites: ClassVar[bool] = True

    def __init__(self, config: TransformerConfig, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.config = config
        self.mixins: Any = nn.ModuleDict()
        self.scopes: dict[str, list[int] | None] = {}
        self._seed, self._device, self._dtype = seed, device, dtype
        with self._building("transformer"):
            self.transformer = Transformer(config)
        self._resolve()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), self._device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), self._dtype)

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

    def nested_models(self) -> Iterator[tuple[str, Any]]:
        """(path, model) of the models that mixins hold, such as ("image.tower", ...), outermost first."""
        for name, mixin in self.mixins.items():
            for path, module in mixin.named_modules():
                if isinstance(module, MixinHost):
                    yield f"{name}.{path}", module

    def _owner(self, path: str) -> tuple[MixinHost, str]:
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
        taken = hasattr(nn.ModuleDict, name) or (hasattr(self.mixins, name) and name not in self.mixins)
        if taken or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"'{name}' cannot name a mixin. Take a word of letters, digits and underscores.")
        sites = [site for layer in self.transformer.layers[:1] for site in layer_sites(layer)] + model_sites(self)
        if name in {site.name for site in sites if site.name.split(".")[0] not in self.mixins}:
            raise ValueError(
                f"'{name}' cannot name a mixin of this model: one of the backbone's own Linears or norms is the site "
                f"'{name}' already. Take another name, such as 'my_{name}'."
            )

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
        rows: dict[tuple[str, str], list[int]] = {}

        def chain(hook: str, claims: list[Claim], default: Callable[..., Any], where: int | None) -> Any:
            key = (hook, *(name for name, _ in claims))
            if key not in memo:
                memo[key] = resolve(hook, claims, default)
            rows.setdefault((hook, shown_chain(hook, claims)), []).extend([] if where is None else [where])
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
                self._resolve_site(site, layer, active, rows, index)
        for site in model_sites(self):
            self._resolve_site(site, None, mixins, rows, None)
        self.whole_sequence = any(m.whole_sequence and "final_forward" in type(m).hooks() for _, m in mixins)
        self.declared = {name: key for key, mixin in mixins for name in mixin.inputs}
        order, shown = list(HOOKS), [
            (hook, shown_layers(where, self.config.num_layers), text) for (hook, text), where in rows.items()
        ]
        self.hooks = HookTable(model_chains, sorted(shown, key=lambda row: order.index(row[0].split(" ")[0])))

    def _resolve_site(
        self, site: Site, layer: Layer | None, mixins: Sequence[Claim],
        rows: dict[tuple[str, str], list[int]], index: int | None,
    ) -> None:
        claims = self._site_claims(site, mixins, f"of site '{site.name}'")
        site.module.hook = resolve_site(site.hook, site, layer, claims, site.module.plain)
        if claims:
            row = (f"{site.hook} {site.name}", shown_chain(site.hook, claims))
            rows.setdefault(row, []).extend([] if index is None else [index])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._resolve()


class _LayerHooks:
    """The resolved layer hooks of one layer."""

    __slots__ = tuple(LAYER_DEFAULTS)


def _insert(modules: nn.ModuleDict, name: str, module: nn.Module, place: int) -> None:
    items = list(modules.items())
    items.insert(place, (name, module))
    modules.clear()
    modules.update(dict(items))
