"""Frequencies of rotary positions, plain or stretched to sequences longer than the weights were trained with."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

_KINDS = ("none", "linear", "dynamic", "llama3", "yarn")


@dataclass
class RotaryScaling:
    """How rotary positions are stretched.

    Attributes:
        kind: `none`; `linear`: all frequencies are divided by the factor (arXiv:2306.15595); `dynamic`: the base grows
            with the length of the row, once it is beyond the trained one (NTK-aware, arXiv:2309.00071, section 3.2);
            `llama3`: long wavelengths are divided, short ones are not, with a ramp between (arXiv:2407.21783);
            `yarn`: a ramp over dimensions, and warmer attention (arXiv:2309.00071, section 3.4).
        factor: by how much.
        original_positions: length that the weights were trained with; None for the model's `max_positions`.
        low_frequency_factor, high_frequency_factor: where the ramp of `llama3` ends and begins, in turns per
            `original_positions`.
        beta_fast, beta_slow: where the ramp of `yarn` begins and ends, in turns per `original_positions`.
        truncate: the ends of yarn's ramp are rounded to whole dimensions.
        attention_factor: of yarn's cosines and sines; None for 0.1 ln(factor) + 1.
    """

    kind: str = "none"
    factor: float = 1.0
    original_positions: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"RotaryScaling.kind is {self.kind!r}; choose one of {', '.join(_KINDS)}.")
        if self.factor < 1:
            raise ValueError(f"RotaryScaling.factor is {self.factor}; it must be at least 1.")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"RotaryScaling.low_frequency_factor {self.low_frequency_factor} must be below high_frequency_factor "
                f"{self.high_frequency_factor}."
            )

    @property
    def temperature(self) -> float:
        """Factor on cosines and sines."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


def frequencies(
    base: float, size: int, device: torch.device | None, scaling: RotaryScaling | None = None
) -> torch.Tensor:
    """[size / 2] angle per position, fp32.

    Args:
        base: wavelength base.
        size: d.
        device: where.
        scaling: with its `original_positions` set. Of kind `dynamic`, these are the frequencies of rows that are no
            longer than that; see `dynamic_frequencies`.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    plain = 1.0 / (base**exponents)
    if scaling is None or scaling.kind in ("none", "dynamic"):
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = _llama3_share(plain, scaling) if scaling.kind == "llama3" else _yarn_share(plain, base, size, scaling)
    return kept * plain + (1 - kept) * plain / scaling.factor


def dynamic_frequencies(base: float, size: int, lengths: torch.Tensor, scaling: RotaryScaling) -> torch.Tensor:
    """[b, size / 2] angle per position of rows with these [b] lengths, fp32."""
    stretch = (lengths.float() / (scaling.original_positions or 1)).clamp_min(1.0)
    bases = base * (scaling.factor * stretch - (scaling.factor - 1)) ** (size / (size - 2))
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=lengths.device) / size
    return 1.0 / (bases[:, None] ** exponents)


def _llama3_share(plain: torch.Tensor, scaling: RotaryScaling) -> torch.Tensor:
    """Share of each frequency that stays: all where it turns often within the trained length, none where seldom."""
    turns = plain * ((scaling.original_positions or 1) / (2 * math.pi))
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


def _yarn_share(plain: torch.Tensor, base: float, size: int, scaling: RotaryScaling) -> torch.Tensor:
    """The same, with a ramp that is straight over dimensions."""

    def dimension(turns: float) -> float:
        wavelengths = (scaling.original_positions or 1) / (turns * 2 * math.pi)
        return size * math.log(wavelengths) / (2 * math.log(base))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    ramp = torch.arange(size // 2, dtype=torch.float32, device=plain.device) - first
    return 1 - (ramp / ((last - first) or 0.001)).clamp(0.0, 1.0)


def angles_of(position_ids: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Positions [b, s] -> [b, s, d], in the precision of the frequencies ([d / 2], or [b, 1, d / 2])."""
    half = position_ids[..., None].to(frequencies.dtype) * frequencies
    return torch.cat([half, half], dim=-1)


def cos_sin(angles: torch.Tensor, scaling: RotaryScaling | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine, and sine with the sign of the first half turned, so that rotating needs no negation."""
    cos, sin = angles.cos(), angles.sin()
    sin[..., : angles.shape[-1] // 2].neg_()
    if scaling is None or scaling.temperature == 1.0:
        return cos, sin
    return cos * scaling.temperature, sin * scaling.temperature


@functools.lru_cache(maxsize=32)
def kept_frequencies(
    base: float, size: int, device: torch.device | None, scaling: tuple[Any, ...] | None
) -> torch.Tensor:
    """`frequencies`, kept between forwards; the scaling as a tuple of its fields."""
    with torch.inference_mode(False), torch.no_grad():
        return frequencies(base, size, device, None if scaling is None else RotaryScaling(*scaling))


@functools.lru_cache(maxsize=8)
def kept_table(
    base: float, size: int, num_rows: int, device: torch.device, scaling: tuple[Any, ...] | None
) -> torch.Tensor:
    """[positions, 2 * d], cosine beside sine; the same numbers as computed anew, kept between forwards."""
    with torch.inference_mode(False), torch.no_grad():
        given = None if scaling is None else RotaryScaling(*scaling)
        angles = angles_of(torch.arange(num_rows, device=device), frequencies(base, size, device, given))
        return torch.cat(cos_sin(angles, given), dim=-1)
