"""Pictures to tensors, number for number as CogVLM and CogAgent were trained on them.

Both released code bases convert to RGB, resize straight to S x S with PIL's (antialiasing) bicubic filter,
keeping neither aspect ratio nor borders, scale to 0..1 and normalise with the mean and standard deviation of
OpenAI CLIP.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

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
    source: ImageSource, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> torch.Tensor:
    """Turn a picture into what a vision tower reads.

    Args:
        source: see `load_image`.
        size: side of the square it is resized to, in pixels.
        mean: per channel, subtracted from the values in 0..1.
        std: per channel, divides the result.

    Returns:
        Tensor [3,size,size], float32.

    Raises:
        ValueError: see `load_image`; also a size that is not positive.
    """
    if size < 1:
        raise ValueError(f"cannot resize a picture to {size} pixels: the size must be at least 1")
    picture = load_image(source).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(torch.float32).div_(255.0)
    shape = (3, 1, 1)
    return pixels.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape)).contiguous()


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
        raise ValueError(
            f"{name} is not a picture that can be read ({error}): give a PNG, JPEG, WebP, GIF, BMP or TIFF file"
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
