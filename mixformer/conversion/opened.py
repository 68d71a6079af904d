"""Checkpoints whose tensors are read one by one, under our names, without the model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn as nn

from mixformer.checkpoint import from_pretrained, recognise, set_source
from mixformer.filling import fill, slots_of
from mixformer.formats import Renamed, foreign_config, foreign_format
from mixformer.model import BaseModel
from mixformer.shards import SafetensorsFolder, TensorSource


class Opened:
    """A checkpoint of any format.

    Args:
        folder: the checkpoint.
        overrides: constants that a foreign format lacks; see `from_pretrained`.
        mixins: classes outside `mixformer` and `models`; see `from_pretrained`.
        trust: import such classes; see `from_pretrained`.
        verify: check the recorded SHA-256 of every shard (own format), meanwhile: `close` waits for it.
        lora_alpha: as SAT's `LoraMixin` was given it, which its files do not record.

    Attributes:
        format: `own`, or the name of a foreign one, such as `hf-cogvlm`.
        model: on the meta device, its tensors of the stored dtypes.
        rules: {our name of a tensor in the files: its rule}.

    Raises:
        ValueError: the folder is no checkpoint, holds parts of several, is damaged, or does not fit its model.
    """

    def __init__(
        self,
        folder: Path,
        overrides: Mapping[str, Any] | None = None,
        mixins: Mapping[str, type] | None = None,
        trust: bool = False,
        verify: bool = True,
        lora_alpha: float = 1.0,
    ) -> None:
        self.folder, self.format = folder, recognise(folder)
        self.weights: TensorSource
        with ExitStack() as stack:
            if self.format == "own":
                self._open_own(stack, overrides, mixins, trust, verify)
            else:
                self._open_foreign(stack, overrides, lora_alpha)
            self._stack = stack.pop_all()

    def _open_own(
        self, stack: ExitStack, overrides: Mapping[str, Any] | None, mixins: Mapping[str, type] | None, trust: bool,
        verify: bool,
    ) -> None:
        from models.weights import Rule

        self.model: BaseModel = from_pretrained(self.folder, None, "meta", overrides, mixins, trust)
        self.weights = weights = SafetensorsFolder(self.folder, verify=False)
        stack.callback(weights.close)
        if verify:
            stack.enter_context(weights.verifying())
        self._take({name: Rule(name, (name,)) for name in slots_of(self.model)})

    def _open_foreign(self, stack: ExitStack, overrides: Mapping[str, Any] | None, lora_alpha: float) -> None:
        from models.weights import SATFolder, Source
        from models.weights.rules import spelling
        from models.weights.sat_lora import add_lora

        found, content, is_sat = foreign_format(self.folder)
        stored = SATFolder(self.folder, content, lora=True) if is_sat else SafetensorsFolder(self.folder)
        stack.callback(stored.close)
        self.weights = weights = Renamed(stored, found.renamed)
        where = self.folder / ("model_config.json" if is_sat else "config.json")
        config = foreign_config(found, content, weights.shapes, overrides, str(where))
        self.model = found.model(config, device="meta").eval()
        rules = found.rules(config)
        if isinstance(stored, SATFolder):
            self.iteration = stored.iteration
            rules += add_lora(self.model, stored, rules, lora_alpha)
        fill(self.model, weights, rules, found.is_ignored, None, "meta")
        self._take({rule.own: rule for rule in rules})
        used = {name for rule in self.rules.values() for name in rule.present(weights.shapes)}
        unused = {name: weights.read(name).clone() for name in weights.shapes if name not in used}
        absent = [name for rule in rules if rule.copies for name in rule.foreign if name not in weights.shapes]
        dtype, spelled = str(self.model.dtype).removeprefix("torch."), spelling(weights.names)
        set_source(self.model, Source(found.name, content, dict(overrides or {}), unused, absent, dtype, spelled))

    def _take(self, table: Mapping[str, Any]) -> None:
        """Keep the rules of tensors that the model has and the files hold, and give the model their dtypes."""
        slots, shapes = slots_of(self.model), self.weights.shapes
        self.rules = {own: rule for own, rule in table.items() if own in slots and rule.present(shapes)}
        self._defaults = {own: table[own].default for own in slots if own not in self.rules}
        for own, rule in self.rules.items():
            retype(slots[own], self.weights.dtypes[rule.present(shapes)[0]])
        for own in self._defaults:
            retype(slots[own], self.model.dtype)

    def read(self, own: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor of ours, whole; it may be a view of the file.

        Args:
            own: its name.
            dtype: of what the files do not hold and is computed; None for the model's.

        Raises:
            ValueError: copies of it that are not equal.
        """
        if own not in self.rules:
            made: torch.Tensor = self._defaults[own](self.model)
            return made.to(dtype or self.model.dtype)
        rule = self.rules[own]
        try:
            return rule.to_own([self.weights.read(name) for name in rule.present(self.weights.shapes)])
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    def close(self) -> None:
        """Close the files, once all that was to be checked is.

        Raises:
            ValueError: a shard is damaged.
        """
        self._stack.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def retype(slots: list[tuple[nn.Module, str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Give a tensor of a model on the meta device another dtype, wherever it is held."""
    held = slots[0][2]
    if held.dtype == dtype:
        return
    made = torch.empty(held.shape, dtype=dtype, device="meta")
    parameter = nn.Parameter(made, requires_grad=held.requires_grad and dtype.is_floating_point)
    for module, name, _ in slots:
        if name in module._parameters:
            module._parameters[name] = parameter
        else:
            module._buffers[name] = made
