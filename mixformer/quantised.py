"""Weight-only quantisation: Linears whose weights are 8-bit or 4-bit integers with scales.

torchao rounds the weights (`pip install "mixformer[quantised]"`); using and training on the result needs torch alone.
A quantised Linear has two frozen parameters instead of `weight`:

- int8: `codes` [out, in] int8 and `scale` [out]; a weight is code * scale.
- int4: `codes` [blocks, in, t / 2] uint8 and `scale` [in / group, blocks * t, 2]; the two numbers of a group of inputs
  are its scale and its offset, and a weight is (code - 8) * scale + offset. Byte j of column c in block i holds row
  i * t + j in its low four bits and row i * t + t / 2 + j in its high ones. t is what torch's kernel for this
  processor wants; rows after the last are zero.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.host import MixinHost
from mixformer.sites import Linear

GROUPS = (128, 64, 32)
KINDS = ("int8", "int4", *(f"int4/{group}" for group in GROUPS))
FEW_ROWS = {8: 24, 4: 64}
"""{bits: inputs up to which torch's own kernel is faster than products with weights that are spelled out}."""

_CHUNK = 2**20  # weights that are rounded or spelled out at a time
_TILES = (64, 32)  # of the kernels for AVX-512 and AVX2


@dataclass(frozen=True)
class Kind:
    """How weights are stored.

    Attributes:
        bits: 8 or 4.
        group: inputs that share a scale; 0 for all of a row.
    """

    bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"int{self.bits}/{self.group}" if self.group else f"int{self.bits}"

    @classmethod
    def of(cls, text: str) -> Kind:
        """The kind of that name: `int8`, `int4` (groups of 64), or `int4/` and 128, 64 or 32.

        Raises:
            ValueError: there is none.
        """
        if text not in KINDS:
            raise ValueError(f"quantise: {text!r} is no kind of weights. Choose of {', '.join(KINDS)}, or none.")
        bits, _, group = text.removeprefix("int").partition("/")
        return cls(int(bits), int(group or 64) if bits == "4" else 0)

    def fitted(self, num_inputs: int) -> Kind:
        """The nearest kind for so many inputs: smaller groups, and int8 where not even they divide."""
        groups = [group for group in GROUPS if group <= self.group and num_inputs % group == 0]
        return self if self.bits == 8 else Kind(4, groups[0]) if groups else Kind(8)


class FrozenParameter(nn.Parameter):
    """A parameter that is never trained."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> FrozenParameter:
        return super().__new__(cls, data, False)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        """Leave it frozen.

        Raises:
            ValueError: it is to be trained.
        """
        if requires_grad:
            raise ValueError(
                "Quantised weights cannot be trained, and `trainable` selects some. Train a LoRA on them instead "
                "(trainable: [lora]), or load the model without `quantise`."
            )
        return self


class QuantisedLinear(Linear):
    """A Linear with quantised weights; a `Linear` becomes one in place (see `quantise_linear`)."""

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def kind(self) -> Kind:
        """How its weights are stored."""
        codes, scale = self.codes, self.scale
        return Kind(8) if codes.dim() == 2 else Kind(4, codes.shape[1] // scale.shape[0])

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """Refused.

        Raises:
            ValueError: always; there is no such tensor, and changes to a copy would be lost.
        """
        raise ValueError(
            f"The weight of this Linear is quantised ({self.kind}) and cannot be read or changed as a whole; use "
            f"`dequantised()`. Merge a LoRA into the original weights, or after `dequantise(model)`."
        )

    def plain(self, x: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """The projection itself, below every mixin."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, self.in_features)
        codes, scale = self.codes, self.scale
        if torch.is_grad_enabled() and x.requires_grad:
            y = _Product.apply(flat, codes, scale, self.out_features)
        else:
            y = product(flat, codes, scale, self.out_features)
        bias = self._parameters["bias"]
        return (y if bias is None else y + bias.to(y.dtype)).view(*x.shape[:-1], self.out_features)

    def dequantised(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [out, in] that the codes stand for, in the dtype of the scales by default."""
        codes, scale = self.codes, self.scale
        return torch.cat(list(spelled_out(codes, scale, dtype or scale.dtype)))[: self.out_features]

    def suit_device(self) -> None:
        """Lay the codes out as this processor's kernel wants them, after they came from a file."""
        codes = self.codes
        if codes.dim() == 3 and codes.device.type == "cpu" and NATIVE_TILE not in (None, 2 * codes.shape[2]):
            assert NATIVE_TILE is not None
            rows = _unpacked(codes).transpose(1, 2).flatten(0, 1)[: self.out_features]
            self.codes = FrozenParameter(_packed(_padded(rows, NATIVE_TILE), NATIVE_TILE))
            numbers = self.scale[:, : self.out_features].transpose(0, 1)
            self.scale = FrozenParameter(_padded(numbers, NATIVE_TILE).transpose(0, 1).contiguous())

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, kind={self.kind}"


# -------------------------------------------------------------------- products


class _Product(torch.autograd.Function):
    """Products with quantised weights; the backward pass spells the weights out again and keeps none of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, num_outputs: int) -> torch.Tensor:
        ctx.save_for_backward(codes, scale)
        return product(x, codes, scale, num_outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (codes, scale), (gradient,) = ctx.saved_tensors, gradients
        made, start = None, 0
        for weight in spelled_out(codes, scale, gradient.dtype):
            part = gradient[:, start : start + len(weight)]
            added = (part @ weight[: part.shape[1]]).float()
            made, start = added if made is None else made.add_(added), start + len(weight)
        assert made is not None
        return made.to(gradient.dtype), None, None, None


def product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """[m, in] times the transposed quantised weight: [m, out]."""
    bits = 8 if codes.dim() == 2 else 4
    if len(x) <= FEW_ROWS[bits] and x.device.type == "cpu" and x.dtype == scale.dtype == torch.bfloat16:
        if bits == 8 and codes.shape[1] % 64 == 0:  # else the kernel reads beyond the end
            return torch._weight_int8pack_mm(x.contiguous(), codes, scale)
        if bits == 4 and 2 * codes.shape[2] == NATIVE_TILE:
            group, flat = codes.shape[1] // scale.shape[0], codes.view(-1, codes.shape[1] // 2)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), flat, group, scale)
            return y[:, :num_outputs]
    parts = [F.linear(x, weight) for weight in spelled_out(codes, scale, x.dtype)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, :num_outputs]


def spelled_out(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The weight in pieces of some rows, [rows, in] each; int4 has further rows behind the last."""
    num_inputs = codes.shape[1]
    if codes.dim() == 2:
        step = max(1, _CHUNK // num_inputs)
        for start in range(0, len(codes), step):
            yield codes[start : start + step].to(dtype).mul_(scale[start : start + step, None].to(dtype))
        return
    tile, num_groups = 2 * codes.shape[2], scale.shape[0]
    step = max(1, _CHUNK // (num_inputs * tile))
    for start in range(0, len(codes), step):
        part = codes[start : start + step]
        rows = len(part) * tile
        factor, offset = scale[:, None, start * tile : start * tile + rows].float().unbind(-1)
        offset = (offset - 8 * factor).to(dtype)  # exact in 32 bits; one product and sum per weight below
        weight = _unpacked(part.transpose(0, 1)).to(dtype).view(num_groups, -1, rows)
        torch.addcmul(offset, weight, factor.to(dtype), out=weight)
        yield weight.view(num_inputs, rows).T  # left as it lies: products take it so, and turning it costs more


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    """[..., t / 2] -> [..., t], four bytes at a time."""
    fours = codes.view(torch.int32)
    return torch.cat([fours & 0x0F0F0F0F, fours >> 4 & 0x0F0F0F0F], -1).view(torch.uint8)


def _packed(codes: torch.Tensor, tile: int) -> torch.Tensor:
    """[blocks * t, in] of 0 to 15 -> [blocks, in, t / 2]."""
    low, high = codes.view(-1, 2, tile // 2, codes.shape[1]).unbind(1)
    return (low | high << 4).transpose(1, 2).contiguous()


def _padded(rows: torch.Tensor, tile: int) -> torch.Tensor:
    missing = -len(rows) % tile
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _native_tile() -> int | None:
    """Which layout torch's kernel for 4-bit weights has on this processor; None if it is none of those known here."""
    codes = (torch.arange(128 * 32, device="cpu") * 7919 % 251 % 16).to(torch.uint8).view(128, 32)
    try:
        wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    return next((tile for tile in _TILES if torch.equal(_packed(codes, tile).flatten(), wanted.flatten())), None)


NATIVE_TILE = _native_tile()


# -------------------------------------------------------------------- models


def choose(model: nn.Module, choices: str | Mapping[str, str | None]) -> dict[str, Kind]:
    """{path of a Linear: kind} of the Linears that selectors choose; embeddings, norms and convolutions stay.

    Args:
        model: any; on the meta device as well.
        choices: {selector: kind}, later ones win, `none` leaves a part as it is; or one kind for all Linears. The
            selectors are those of `mixformer.train.roles`.

    Raises:
        ValueError: a selector that matches nothing, or no Linear; an unknown kind; weights that are quantised already.
    """
    from mixformer.train.roles import select_parameters

    linears = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    already = [path for path, linear in linears.items() if isinstance(linear, QuantisedLinear)]
    if already:
        raise ValueError(f"'{already[0]}' is quantised already, so `quantise` cannot be given: leave it out.")
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    tied = {path: holders[id(linear.weight)] for path, linear in linears.items() if len(holders[id(linear.weight)]) > 1}
    found: dict[str, Kind | None] = {}
    for selector, text in ({"*": choices} if isinstance(choices, str) else choices).items():
        kind = None if text in (None, "none") else Kind.of(str(text))
        try:
            names = select_parameters(model, [selector])
        except ValueError as error:
            raise ValueError(f"quantise: {error}") from error
        paths = [path for path in linears if f"{path}.weight" in names]
        if not [path for path in paths if path not in tied]:
            what = f"only '{paths[0]}', which shares its weight with {tied[paths[0]]}" if paths else "no Linear"
            raise ValueError(f"quantise: the selector '{selector}' chooses {what}; only Linears are quantised.")
        found.update((path, kind) for path in paths if path not in tied)
    chosen = {path: kind for path, kind in found.items() if kind is not None}
    fitted = {path: kind.fitted(linears[path].in_features) for path, kind in chosen.items()}
    changed = [path for path, kind in fitted.items() if kind.bits != chosen[path].bits]
    if changed:
        warnings.warn(
            f"{len(changed)} Linear(s) take int8 instead of int4, such as '{changed[0]}': their "
            f"{linears[changed[0]].in_features} inputs do not divide into groups of {GROUPS[-1]}.",
            stacklevel=2,
        )
    return fitted


@torch.no_grad()
def quantise_linear(
    linear: Any, weight: torch.Tensor, kind: Kind, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Make a Linear a quantised one, in place. Its chain of hooks has to be resolved again.

    Args:
        linear: its bias stays; its own weight may have no memory.
        weight: [out, in].
        kind: one that fits the number of inputs.
        dtype: of the scales, the dtype that the Linear computes in; None for the weight's.
        device: where they go; None for the weight's.

    Raises:
        ValueError: weights of 64 bits or with numbers that are not finite, or torchao is not installed; the Linear is
            left as it was.
    """
    dtype = dtype or weight.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"Weights of {dtype} are not quantised: give dtype bfloat16, float16 or float32.")
    codes, scale = _rounded(weight.to(dtype), kind)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"some of its numbers are not finite in {dtype}, so the weight cannot be quantised.")
    _become(linear, codes.to(device or weight.device), scale.to(device or weight.device))


def shape_linear(linear: Any, kind: Kind, dtype: torch.dtype | None = None) -> None:
    """Make a Linear a quantised one on the meta device, in place: shapes only; arguments as of `quantise_linear`."""
    rows, columns = linear.out_features, linear.in_features
    dtype = dtype or linear.weight.dtype
    if kind.bits == 8:
        codes, scale = torch.empty(rows, columns, dtype=torch.int8, device="meta"), (rows,)
    else:
        tile = NATIVE_TILE or _TILES[0]
        blocks = math.ceil(rows / tile)
        codes = torch.empty(blocks, columns, tile // 2, dtype=torch.uint8, device="meta")
        scale = (columns // kind.group, blocks * tile, 2)  # type: ignore[assignment]
    _become(linear, codes, torch.empty(scale, dtype=dtype, device="meta"))


def _become(linear: Any, codes: torch.Tensor, scale: torch.Tensor) -> None:
    linear.__class__ = QuantisedLinear
    bias = linear._parameters.pop("bias", None)
    linear._parameters.pop("weight", None)
    linear.scale = FrozenParameter(scale)  # first: it tells the dtype that the Linear computes in
    linear.codes = FrozenParameter(codes)
    linear._parameters["bias"] = bias


def _rounded(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight, by torchao, some rows at a time."""
    quantised, mapping = torchao()
    rows, columns = weight.shape
    if kind.bits == 8:
        codes, scale = weight.new_empty(rows, columns, dtype=torch.int8), weight.new_empty(rows)
        for start, part in _pieces(weight, 1):
            made = quantised.from_hp(part, (1, columns), torch.int8, mapping_type=mapping.SYMMETRIC)
            codes[start : start + len(part)], scale[start : start + len(part)] = made.qdata, made.scale.flatten()
        return codes, scale
    tile = NATIVE_TILE or _TILES[0]
    blocks, group, four_bits = math.ceil(rows / tile), kind.group, torch.int4  # type: ignore[attr-defined]
    codes = weight.new_empty(blocks, columns, tile // 2, dtype=torch.uint8)
    scale = weight.new_zeros(columns // group, blocks * tile, 2)
    for start, part in _pieces(weight, tile):
        made = quantised.from_hp(part, (1, group), four_bits, mapping_type=mapping.ASYMMETRIC)
        factor, first = made.scale.T, start // tile
        packed = _packed(_padded((made.qdata + 8).to(torch.uint8), tile), tile)
        codes[first : first + len(packed)] = packed
        scale[:, start : start + len(part), 0] = factor
        scale[:, start : start + len(part), 1] = -made.zero_point.T.to(factor.dtype) * factor
    return codes, scale


def _pieces(weight: torch.Tensor, multiple: int) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, _CHUNK // (weight.shape[1] * multiple)) * multiple
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        yield start, part.float() if part.dtype == torch.float16 else part  # torchao has no small scales in fp16


def torchao() -> tuple[Any, Any]:
    """torchao's tensor that rounds, and how it centres; importing it reports kernels that this machine cannot have.

    Raises:
        ValueError: it is not installed.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType
    except ImportError as error:
        raise ValueError(f'quantise: torchao is needed: pip install "mixformer[quantised]" ({error})') from error
    finally:
        logging.disable(disabled)
    return IntxUnpackedToInt8Tensor, MappingType


def quantise(model: nn.Module, choices: str | Mapping[str, str | None]) -> None:
    """Quantise the Linears of a model that is in memory, in place; `from_pretrained(quantise=...)` never has it there.

    Args:
        model: any.
        choices: as of `choose`.

    Raises:
        ValueError: as of `choose` and `quantise_linear`, or a LoRA is merged, whose originals would not fit any more.
            Linears before the one that an error names are quantised then.
    """
    modules = dict(model.named_modules())
    merged = [path for path, module in modules.items() if getattr(module, "merged", False) is True]
    if merged:
        raise ValueError(
            f"quantise: '{merged[0]}' is merged into weights that it could not be taken out of afterwards. Call its "
            f"unmerge(), or `merge_loras(model)` of mixformer.merge to merge it for good."
        )
    try:
        for path, kind in choose(model, choices).items():
            linear: Any = modules[path]
            try:
                quantise_linear(linear, linear.weight.detach(), kind)
            except ValueError as error:
                raise ValueError(f"'{path}.weight': {error}") from error
    finally:
        resolve_hooks(model)


@torch.no_grad()
def dequantise(model: nn.Module) -> None:
    """Make all quantised Linears plain ones again, in place, with the weights that their codes stand for."""
    linears: list[Any] = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    for linear in linears:
        weight, bias = linear.dequantised(), linear._parameters.pop("bias")
        linear._parameters.clear()
        linear.__class__ = Linear
        linear._parameters.update(weight=nn.Parameter(weight, requires_grad=False), bias=bias)
    resolve_hooks(model)


def resolve_hooks(model: nn.Module) -> None:
    """Resolve all chains again: they hold methods of Linears, whose class has changed."""
    for inner in model.modules():
        if isinstance(inner, MixinHost):
            inner._resolve()


def make_stored_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], where: str
) -> None:
    """Make those Linears of a model on the meta device quantised that are so in a file.

    Args:
        model: as it was composed.
        shapes, dtypes: of the tensors in the file.
        where: the place, for errors.

    Raises:
        ValueError: codes or scales that do not fit each other or the model.
    """
    changed = False
    for path, linear in list(model.named_modules()):
        name = f"{path}.codes"
        if not isinstance(linear, Linear) or name not in shapes:
            continue
        codes, scale = shapes[name], shapes.get(f"{path}.scale", ())
        if not _belong(codes, scale, dtypes[name], linear):
            kind = str(dtypes[name]).removeprefix("torch.")
            raise ValueError(
                f"{where} does not fit {type(model).__name__}: '{name}' is {kind} {list(codes)} with scales "
                f"{list(scale)}, which are no quantised weights of {linear.out_features} outputs and "
                f"{linear.in_features} inputs. Check the sizes in the config file, or fetch the folder again."
            )
        _become(
            linear, torch.empty(codes, dtype=dtypes[name], device="meta"),
            torch.empty(scale, dtype=dtypes[f"{path}.scale"], device="meta"),
        )
        changed = True
    if changed:
        resolve_hooks(model)


def _belong(codes: tuple[int, ...], scale: tuple[int, ...], dtype: torch.dtype, linear: Linear) -> bool:
    rows, columns = linear.out_features, linear.in_features
    if dtype == torch.int8:
        return codes == (rows, columns) and scale == (rows,)
    if dtype != torch.uint8 or len(codes) != 3 or len(scale) != 3:
        return False
    tile, groups = 2 * codes[2], [columns // group for group in GROUPS if columns % group == 0]
    blocks = math.ceil(rows / tile) if tile else 0
    return tile in _TILES and codes[:2] == (blocks, columns) and scale in [(g, blocks * tile, 2) for g in groups]


def quantised_table(model: nn.Module) -> str:
    """A line for each part and kind of weights: Linears, weights and megabytes."""
    nested = [path for path, _ in model.nested_models()] if isinstance(model, MixinHost) else []
    counts: dict[tuple[str, str], list[int]] = {}
    for path, linear in model.named_modules():
        if not isinstance(linear, Linear):
            continue
        if isinstance(linear, QuantisedLinear):
            kind, num_bytes = str(linear.kind), linear.codes.nbytes + linear.scale.nbytes
        else:
            kind, num_bytes = str(linear.weight.dtype).removeprefix("torch."), linear.weight.nbytes
        count = counts.setdefault((_part(path, nested), kind), [0, 0, 0])
        sizes = (1, linear.out_features * linear.in_features, num_bytes)
        count[:] = [old + new for old, new in zip(count, sizes, strict=True)]
    rows = [("part", "weights", "Linears", "parameters", "MB")]
    rows += [(*key, f"{n:,}", f"{weights:,}", f"{size / 1e6:,.1f}") for key, (n, weights, size) in counts.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _part(path: str, nested: list[str]) -> str:
    match = re.fullmatch(r"(?:transformer\.layers\.\d+\.)?mixins\.(.+)", path)
    if match is None:
        return "language"
    inside = [name for name in nested if match[1].startswith(f"{name}.")]
    return inside[0] if inside else match[1].partition(".")[0]
