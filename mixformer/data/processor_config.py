"""How prompts and pictures of one model are written down: the settings of `processor.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixformer.images import CLIP_MEAN, CLIP_STD, FILTERS, FITS
from mixformer.prompts import Family, get_family, get_template

IMAGE_PLACES = ("front", "first", "slot", "last")
"""Where images stand: before bos, after it, where the text marks them, or behind everything."""


@dataclass(frozen=True)
class TilingConfig:
    """How a picture is cut into tiles (InternVL-Chat 1.5, arXiv:2404.16821, section 3.2).

    Attributes:
        min_tiles: at least so many tiles.
        max_tiles: at most so many.
        thumbnail: add the whole picture as one more tile, where there is more than one.
    """

    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(
                f"processor setting tiles needs 1 <= min_tiles <= max_tiles, got {self.min_tiles} and {self.max_tiles}"
            )


@dataclass(frozen=True)
class ProcessorConfig:
    """How prompts and pictures of one model are written down.

    Attributes:
        family: whose prompt spelling (`mixformer.prompts.FAMILIES`).
        template: the template used where a call names none; None for the family's default.
        image_size: side of the square picture in pixels; None for a model without pictures.
        patch_size: side of a patch in pixels.
        downsample: patches merged per side after the tower (2 in CogVLM2).
        num_image_tokens: patches of one image in the sequence, without boi and eoi; None to follow from the
            sizes.
        cross_image_size: side of the high-resolution picture; None without one.
        coordinate_grid: steps that boxes and points in prompts are rounded to, for a tokenizer that has only so
            many coordinates; None leaves thousandths as they are.
        image_mean: per channel, of pictures in 0..1.
        image_std: per channel.
        image_fit: how pictures are brought to size (`mixformer.images.fit_picture`): `stretch`, `crop`, `pad`, or
            `native`, which keeps the aspect ratio: pictures of a batch are padded, `pixel_attention_mask` tells where,
            and `num_image_tokens` must be given.
        image_filter: `bicubic` or `bilinear`.
        shortest_side: with `native`, the least that a side may have, in pixels.
        image_marks: whether the model has boi and eoi around the patches of each image.
        image_place: `front` (before bos), `first` (after bos), `slot` (where the text marks them) or `last` (behind
            everything, an answer included); None for `slot` in families that have one, else `first`.
        image_open: text before the tokens of an image; None for the family's.
        image_close: text after them; None for the family's.
        tiles: cut pictures into tiles, each an image of the model; all tiles of a picture share one `image_open` and
            `image_close`. None for no tiles.
        quarters: cut pictures into quarters and add the whole, each an image with an `image_open` and `image_close`
            of its own.
        prefix_lm: add `prefix_lengths`, the number of tokens of each row's prompt, images included.
        bos_id: id that opens a sequence; None for none.
        eos_id: id that ends an answer in training.
        pad_id: id that fills a batch.
        placeholder_id: id at boi, patches and eoi; the model overwrites their embeddings.
        stop_ids: every id that ends generation.
    """

    family: str = "hf-cogvlm"
    template: str | None = None
    image_size: int | None = None
    patch_size: int = 14
    downsample: int = 1
    num_image_tokens: int | None = None
    cross_image_size: int | None = None
    coordinate_grid: int | None = None
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    image_fit: str = "stretch"
    image_filter: str = "bicubic"
    shortest_side: int = 1
    image_marks: bool = True
    image_place: str | None = None
    image_open: str | None = None
    image_close: str | None = None
    tiles: TilingConfig | None = None
    quarters: bool = False
    prefix_lm: bool = False
    bos_id: int | None = 1
    eos_id: int = 2
    pad_id: int = 0
    placeholder_id: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        get_template(self.family, self.template)
        object.__setattr__(self, "image_mean", tuple(self.image_mean))
        object.__setattr__(self, "image_std", tuple(self.image_std))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids) or (self.eos_id,))
        if isinstance(self.tiles, Mapping):
            object.__setattr__(self, "tiles", TilingConfig(**self.tiles))
        self._check_numbers()
        self._check_choices()
        step = self.patch_size * self.downsample
        if self.image_size is not None and self.num_image_tokens is None:
            if self.image_fit == "native":
                raise ValueError("image_fit native gives pictures of any size: give num_image_tokens as well")
            if self.image_size % step:
                raise ValueError(
                    f"image_size {self.image_size} does not divide into patches of {self.patch_size}, "
                    f"{self.downsample} merged per side: choose a multiple of {step}, or give num_image_tokens"
                )
        if self.cross_image_size is not None and self.image_size is None:
            raise ValueError("cross_image_size comes beside image_size: give both")
        if self.cross_image_size is not None and (self.tiles is not None or self.quarters):
            raise ValueError("cross_image_size reads whole pictures, tiles and quarters do not: leave one out")
        if self.tiles is not None and (self.quarters or self.image_fit == "native"):
            raise ValueError("tiles are cut to image_size: leave out quarters and image_fit native")

    def _check_numbers(self) -> None:
        optional = ("image_size", "num_image_tokens", "cross_image_size", "coordinate_grid")
        given = [name for name in optional if getattr(self, name) is not None]
        for name in ("patch_size", "downsample", "shortest_side", *given):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"processor setting {name} must be a positive whole number, got {value!r}")
        for name in ("bos_id", "eos_id", "pad_id", "placeholder_id"):
            value = getattr(self, name)
            absent = value is None and name == "bos_id"
            if not absent and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"processor setting {name} must be a token id, got {value!r}")

    def _check_choices(self) -> None:
        choices: dict[str, Any] = {"image_fit": FITS, "image_filter": FILTERS, "image_place": (None, *IMAGE_PLACES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                names = ", ".join(str(choice) for choice in known if choice is not None)
                raise ValueError(f"processor setting {name} is {getattr(self, name)!r}: choose one of {names}")
        if self.image_place == "slot" and self.spelling.image_slot is None:
            raise ValueError(f"image_place slot needs a family that marks images in its text, not {self.family!r}")
        if self.image_place == "last" and self.prefix_lm:
            raise ValueError("prefix_lm needs images within the prefix: choose another image_place than last")

    @property
    def spelling(self) -> Family:
        """The family itself."""
        return get_family(self.family)

    @property
    def place(self) -> str:
        """Where images stand, one of `IMAGE_PLACES`."""
        return self.image_place or ("first" if self.spelling.image_slot is None else "slot")

    @property
    def image_length(self) -> int:
        """Patches of one image in the sequence (boi and eoi not counted); 0 without pictures."""
        if self.image_size is None:
            return 0
        return self.num_image_tokens or (self.image_size // (self.patch_size * self.downsample)) ** 2

    @property
    def span_length(self) -> int:
        """Tokens of one image that the model fills: its patches, and boi and eoi where there are such marks."""
        return self.image_length + 2 * self.image_marks
