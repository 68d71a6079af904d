"""Pictures to tensors, number for number as the released models were trained on them.

Pictures are converted to RGB, brought to size with PIL's (antialiasing) filters, scaled to 0..1 and normalised. How
they are brought to size differs: CogVLM and CogAgent resize straight to S x S, CLIP and GIT keep the aspect ratio and
cut the middle out, LLaVA-1.5 pads to a square first, Idefics2 keeps the aspect ratio (`FITS`). InternVL-Chat 1.5 cuts
a picture into tiles (`tile_picture`), Idefics2 into quarters (`quarter_picture`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

FITS = ("stretch", "crop", "pad", "native")
"""How a picture is brought to size; see `fit_picture`."""

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

ImageSource = str | Path | bytes | bytearray | Image.Image | np.ndarray
"""A file, the bytes of one, a PIL image, or an array [y,x], [y,x,1], [y,x,3] or [y,x,4]."""

# Pictures only: Pillow also opens formats that start other programs (EPS runs Ghostscript).
_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "ICO",
    "TGA",
    "JPEG2000",
    "AVIF",
)


def load_image(source: ImageSource) -> Image.Image:
    """Open a picture in any usual form.

    Files turned by EXIF are turned upright. CMYK, palette, grayscale and alpha pictures become RGB as
    Pillow's ``convert("RGB")`` has it, which is what the released models saw: alpha is dropped, not blended.
    Sixteen-bit pictures are scaled to eight bits. Of an animation the first frame is taken.

    Args:
        source: path, file content, PIL image (never changed) or array: uint8, bool, uint16 (0..65535), or
            float (0..1).

    Returns:
        An RGB image.

    Raises:
        ValueError: nothing there, zero bytes, truncated, no picture, too large to be decoded safely, or an
            array of an unusable shape or range. The message names the source and what to do.
        TypeError: a source of another type.
    """
    name = _describe(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        return _to_rgb(_decode(source, name), name)
    if isinstance(source, (bytes, bytearray)):
        return _open(bytes(source), name)
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            hint = "download it and give its path" if "://" in str(source) else "name an existing file"
            raise ValueError(f"{name} is not there: {hint}")
        return _open(Path(source).read_bytes(), name)
    raise TypeError(
        f"cannot make a picture of {type(source).__name__}: give a path, the bytes of a file, a PIL image "
        f"or a numpy array"
    )


def preprocess_image(
    source: ImageSource,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    fit: str = "stretch",
    resample: str = "bicubic",
    shortest: int = 1,
) -> torch.Tensor:
    """Turn a picture into what a vision tower reads.

    Args:
        source: see `load_image`.
        size: side of the square it is brought to, in pixels; with `native`, the most that a side may have.
        mean: per channel, subtracted from the values in 0..1.
        std: per channel, divides the result.
        fit: one of `FITS`.
        resample: one of `FILTERS`.
        shortest: with `native`, the least that a side may have.

    Returns:
        Tensor [3,size,size] ([3,y,x] with `native`), float32.

    Raises:
        ValueError: see `load_image`; also a size that is not positive, an unknown fit or filter.
    """
    fill = tuple(int(value * 255) for value in mean)
    picture = fit_picture(load_image(source), size, fit, resample, (fill[0], fill[1], fill[2]), shortest)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(torch.float32).div_(255.0)
    shape = (3, 1, 1)
    return pixels.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape)).contiguous()


def fit_picture(
    picture: Image.Image,
    size: int,
    fit: str = "stretch",
    resample: str = "bicubic",
    fill: tuple[int, int, int] = (0, 0, 0),
    shortest: int = 1,
) -> Image.Image:
    """Bring a picture to size.

    Args:
        picture: RGB.
        size: side of the square, in pixels.
        fit: `stretch` resizes both sides to `size`; `crop` resizes the shorter side to it and cuts the middle out;
            `pad` adds borders of colour `fill` until the picture is square, then resizes it; `native` resizes only
            pictures with a side longer than `size` or shorter than `shortest`, and keeps the aspect ratio where the
            latter allows it.
        resample: one of `FILTERS`.
        fill: colour of borders.
        shortest: with `native`, the least that a side may have.

    Raises:
        ValueError: a size that is not positive, an unknown fit or filter.
    """
    if size < 1:
        raise ValueError(f"cannot resize a picture to {size} pixels: the size must be at least 1")
    if resample not in FILTERS:
        raise ValueError(f"no filter {resample!r}: choose one of {', '.join(FILTERS)}")
    if fit not in FITS:
        raise ValueError(f"no fit {fit!r} of pictures: choose one of {', '.join(FITS)}")
    width, height = picture.size
    if fit == "pad" and width != height:
        square = Image.new("RGB", (max(width, height),) * 2, fill)
        square.paste(picture, ((square.width - width) // 2, (square.height - height) // 2))
        picture = square
    elif fit == "crop":
        scaled = (size * width // min(width, height), size * height // min(width, height))
        left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
        return picture.resize(scaled, FILTERS[resample]).crop((left, top, left + size, top + size))
    elif fit == "native":
        ratio, sides = width / height, (width, height)
        if max(sides) > size:
            sides = (size, int(size / ratio)) if width >= height else (int(size * ratio), size)
        return picture.resize((max(sides[0], shortest), max(sides[1], shortest)), FILTERS[resample])
    return picture.resize((size, size), FILTERS[resample])


def tile_grid(width: int, height: int, size: int, min_tiles: int = 1, max_tiles: int = 12) -> tuple[int, int]:
    """Columns and rows of the grid of square tiles whose aspect ratio is nearest to a picture's.

    Of grids that are equally near, those with more tiles are taken while the picture has more than half of their
    pixels (InternVL-Chat 1.5, arXiv:2404.16821, section 3.2).

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        size: side of a tile, in pixels.
        min_tiles: at least so many tiles.
        max_tiles: at most so many.
    """
    counts = range(1, max_tiles + 1)
    grids = [(x, y) for x in counts for y in counts if min_tiles <= x * y <= max_tiles]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    ratio, best, least = width / height, (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(ratio - columns / rows)
        if distance < least or (distance == least and 2 * width * height > size * size * columns * rows):
            best, least = (columns, rows), distance
    return best


def tile_picture(
    picture: Image.Image,
    size: int,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
    resample: str = "bicubic",
) -> list[Image.Image]:
    """Resize a picture to the grid that `tile_grid` chooses and cut it into size x size tiles, row by row.

    Args:
        picture: RGB.
        size: side of a tile, in pixels.
        min_tiles: at least so many tiles.
        max_tiles: at most so many.
        thumbnail: add the whole picture, resized to one tile, behind more than one tile.
        resample: one of `FILTERS`.
    """
    columns, rows = tile_grid(*picture.size, size, min_tiles, max_tiles)
    whole = picture.resize((columns * size, rows * size), FILTERS[resample])
    corners = [(x * size, y * size) for y in range(rows) for x in range(columns)]
    tiles = [whole.crop((left, top, left + size, top + size)) for left, top in corners]
    return [*tiles, fit_picture(picture, size, "stretch", resample)] if thumbnail and len(tiles) > 1 else tiles


def quarter_picture(picture: Image.Image) -> list[Image.Image]:
    """The quarters of a picture, row by row, and then all of it (Idefics2, arXiv:2405.02246, section 3.3).

    Raises:
        ValueError: a picture of less than 2 x 2 pixels.
    """
    if min(picture.size) < 2:
        raise ValueError(f"cannot quarter a picture of {picture.width} x {picture.height} pixels: give a larger one")
    (width, height), (x, y) = picture.size, (picture.width // 2, picture.height // 2)
    boxes = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    return [*(picture.crop(box) for box in boxes), picture]


def _describe(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return f"image file {source}"
    if isinstance(source, (bytes, bytearray)):
        return f"image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"image array {list(source.shape)} of {source.dtype}"
    filename = getattr(source, "filename", "")
    return f"image file {filename}" if filename else "PIL image"


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"{name} is empty (zero bytes): write or download it again")
    Image.init()
    formats = [kind for kind in _FORMATS if kind in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # Pillow warns of a picture over its limit and refuses one over twice its limit: one limit is
            # enough.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_large(name, str(error))) from error
    except Exception as error:
        # Pillow names the object that it read from, which says nothing to people.
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"{name} is not a picture that can be read ({reason}): give a PNG, JPEG, WebP, GIF, BMP or TIFF file"
        ) from error
    return _to_rgb(_decode(picture, name), name)


def _too_large(name: str, detail: str) -> str:
    return (
        f"{name} is too large to be decoded safely ({detail}): make it smaller first, or raise "
        f"PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )


def _decode(picture: Image.Image, name: str) -> Image.Image:
    """Read the pixels and turn them upright."""
    width, height = picture.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(_too_large(name, f"{width} x {height} pixels, the limit is {limit}"))
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels ({width} x {height}): give a picture of at least 1 x 1")
    try:
        picture.load()
    except Exception as error:
        raise ValueError(f"{name} is truncated or damaged ({error}): write or download it again") from error
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture  # unreadable EXIF says nothing about the pixels, which are fine


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _from_array(np.clip(np.asarray(picture), 0, 65535).astype(np.uint16), name)
    if picture.mode == "F":
        return _from_array(np.asarray(picture), name)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # the same numbers, without Pillow's warning about the dropped alpha
    return picture.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"{name} is no picture: expected [y,x], [y,x,1], [y,x,3] or [y,x,4], channels last")
    if array.dtype == np.uint8:
        pixels = array
    elif array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        pixels = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails too
            raise ValueError(f"{name} has values from {low:g} to {high:g}: scale float pictures to 0..1")
        pixels = np.round(array * 255.0).astype(np.uint8)
    else:
        raise ValueError(f"{name} has unusable values: give uint8, bool, uint16 or float in 0..1")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim == 3:
        pixels = pixels[:, :, :3]
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
