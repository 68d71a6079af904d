"""Preprocessing: the recorded numbers, every usual kind of picture, and clear errors for the rest."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mixformer.images import load_image, preprocess_image, quarter_picture, tile_grid, tile_picture

GOLDEN = Path(__file__).parent / "golden"
RECORDED = [
    (case, kind)
    for case in ("cogvlm-hf", "cogagent-hf", "cogvlm2-hf", "cogvlm-sat", "cogagent-sat")
    for kind in ("images", "cross_images")
    if kind == "images" or "cogagent" in case
]
RED, BLUE = (200, 40, 30), (20, 60, 220)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def half_and_half(mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue, 8 x 4."""
    picture = Image.new("RGB", (8, 4), RED)
    picture.paste(BLUE, (4, 0, 8, 4))
    return picture.convert(mode)


@pytest.mark.parametrize(("case", "kind"), RECORDED)
def test_tensors_equal_the_recorded_ones(case: str, kind: str) -> None:
    with safe_open(GOLDEN / case / "inputs.safetensors", "pt") as file:
        expected = file.get_tensor(kind)
    for index, name in enumerate(("image.png", "image2.png")):
        tensor = preprocess_image(GOLDEN / case / name, expected.shape[-1])
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[index], atol=1e-6, rtol=0)


def test_every_source_gives_the_same_tensor() -> None:
    path = GOLDEN / "cogvlm-hf" / "image.png"
    expected = preprocess_image(path, 42)
    data = path.read_bytes()
    with Image.open(path) as opened:
        sources = [str(path), data, bytearray(data), opened, np.asarray(opened)]
        for source in sources:
            assert torch.equal(preprocess_image(source, 42), expected)


def test_normalisation_is_that_of_clip() -> None:
    tensor = preprocess_image(Image.new("RGB", (3, 5), (255, 0, 51)), 2)
    expected = [(1 - 0.48145466) / 0.26862954, (0 - 0.4578275) / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(tensor, torch.tensor(expected)[:, None, None].expand(3, 2, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_modes_become_what_convert_rgb_makes_of_them(mode: str) -> None:
    source = half_and_half().convert(mode)
    assert np.array_equal(np.asarray(load_image(source)), np.asarray(source.convert("RGB")))


def test_a_cmyk_jpeg_works() -> None:
    data = encoded(half_and_half("CMYK"), "JPEG", quality=95)
    pixels = np.asarray(load_image(data)).astype(int)
    assert np.abs(pixels[2, 0] - RED).max() < 30 and np.abs(pixels[2, 7] - BLUE).max() < 30


def test_alpha_is_dropped_not_blended() -> None:
    source = Image.new("RGBA", (2, 2), (*RED, 0))
    assert np.asarray(load_image(encoded(source)))[0, 0].tolist() == list(RED)


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    source = half_and_half("P")
    data = encoded(source, transparency=bytes([0] * 128 + [255] * 128))
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(source.convert("RGB")))


def test_sixteen_bit_gray_is_scaled_to_eight_bits() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    expected = [0, 1, 128, 255]
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(values), kind)
        assert np.asarray(load_image(data))[0, :, 0].tolist() == expected
    assert np.asarray(load_image(values))[0, :, 2].tolist() == expected
    assert np.asarray(load_image(Image.fromarray(values.astype(np.int32))))[0, :, 1].tolist() == expected


def test_sixteen_bit_colour_works() -> None:
    # An RGB PNG of 16 bits per channel, written by hand because Pillow does not write them.
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + struct.pack(">6H", 65535, 0, 128 * 257, 257, 65535, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + chunks
    assert np.asarray(load_image(data)).tolist() == [[[255, 0, 128], [1, 255, 0]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_turned_by_exif_stands_upright(kind: str) -> None:
    upright = half_and_half().resize((32, 16), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: turn it clockwise to look at it
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    picture = load_image(encoded(stored, kind, exif=exif))
    assert picture.size == (32, 16)
    pixels = np.asarray(picture).astype(int)
    assert np.abs(pixels[8, 2] - RED).max() < 40 and np.abs(pixels[8, 30] - BLUE).max() < 40


def test_arrays_of_every_kind_agree() -> None:
    pixels = np.asarray(half_and_half())
    expected = np.asarray(load_image(pixels))
    with_alpha = np.concatenate([pixels, np.zeros((4, 8, 1), np.uint8)], axis=2)
    for array in (with_alpha, pixels / 255.0, (pixels / 255.0).astype(np.float32), pixels.astype(np.uint16) * 257):
        assert np.array_equal(np.asarray(load_image(array)), expected)
    flags = np.array([[True, False]])
    for array in (flags, flags[:, :, None], flags.astype(np.float64)):
        assert np.asarray(load_image(array))[0].tolist() == [[255] * 3, [0] * 3]


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(load_image(data)).astype(int)[0, 0] - RED).max() < 10


def test_the_source_picture_is_not_changed() -> None:
    source = half_and_half("RGBA")
    before = source.tobytes()
    preprocess_image(source, 3)
    assert source.mode == "RGBA" and source.size == (8, 4) and source.tobytes() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>not found</html>", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
def test_content_that_is_no_picture_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "screen.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"screen\.png.*{reason}"):
        load_image(path)
    with pytest.raises(ValueError, match=rf"image of {len(content)} bytes.*{reason}") as error:
        load_image(content)
    assert " object at " not in str(error.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ValueError, match=r"truncated or damaged|not a picture"):
        load_image(data[: len(data) // 2])


@pytest.mark.parametrize("over", [1.5, 3.0])
def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, over: float) -> None:
    data = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / over))
    with pytest.raises(ValueError, match=r"too large.*MAX_IMAGE_PIXELS"):
        load_image(data)


def test_a_missing_file_and_an_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.png is not there"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="download it"):
        load_image("https://example.org/a.png")


def test_arrays_that_are_no_picture_are_refused() -> None:
    with pytest.raises(ValueError, match="channels last"):
        load_image(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="channels last"):
        load_image(np.zeros((0, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"scale float pictures to 0\.\.1"):
        load_image(np.full((2, 2, 3), 255.0))
    with pytest.raises(ValueError, match=r"scale float pictures to 0\.\.1"):
        load_image(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="give uint8"):
        load_image(np.zeros((2, 2, 3), np.int64))


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="Tensor"):
        load_image(torch.zeros(3, 2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        preprocess_image(Image.new("RGB", (2, 2)), 0)


# ---------------------------------------------------------------- bringing pictures to size, as transformers does


def patterned(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


SIZES = [(40, 40), (61, 33), (33, 61), (200, 35), (21, 90), (12, 7)]
HALF = (0.5, 0.5, 0.5)


def reference(name: str, pictures: list[Image.Image], **options: object) -> dict[str, torch.Tensor]:
    """Prepare pictures with an image processor of transformers that needs nothing but Pillow."""
    import importlib

    folder = {"CLIP": "clip", "Llava": "llava", "Idefics2": "idefics2", "GotOcr2": "got_ocr2"}[name]
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    return dict(getattr(module, f"{name}ImageProcessorPil")(**options)(pictures, return_tensors="pt"))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_squares_are_those_of_the_released_processors(fit: str, resample: str) -> None:
    pictures = [patterned(*size) for size in SIZES]
    square = {"height": 24, "width": 24}
    number = {"bicubic": 3, "bilinear": 2}[resample]
    options = {"crop_size": square, "do_center_crop": fit == "crop", "resample": number}
    size = square if fit == "stretch" else {"shortest_edge": 24}
    name = "Llava" if fit == "pad" else "CLIP"
    expected = reference(name, pictures, size=size, **options, **({"do_pad": True} if fit == "pad" else {}))
    ours = torch.stack([preprocess_image(picture, 24, fit=fit, resample=resample) for picture in pictures])
    torch.testing.assert_close(ours, expected["pixel_values"], atol=1e-6, rtol=0)


def test_native_pictures_have_the_sizes_of_idefics2() -> None:
    pictures = [patterned(*size) for size in SIZES]
    expected = reference("Idefics2", [pictures], size={"longest_edge": 60, "shortest_edge": 20})  # type: ignore[list-item]
    masks, pixels = expected["pixel_attention_mask"][0].bool(), expected["pixel_values"][0]
    for picture, mask, values in zip(pictures, masks, pixels, strict=True):
        ours = preprocess_image(picture, 60, HALF, HALF, "native", "bilinear", 20)
        assert mask.sum() == ours.shape[1] * ours.shape[2]
        torch.testing.assert_close(ours, values[:, : ours.shape[1], : ours.shape[2]], atol=1e-6, rtol=0)


def test_quarters_and_the_whole_are_those_of_idefics2() -> None:
    picture = patterned(31, 18)
    options = {"do_resize": False, "do_image_splitting": True}
    expected = reference("Idefics2", [[picture]], **options)  # type: ignore[list-item]
    parts = quarter_picture(picture)
    assert len(parts) == 5
    for part, values in zip(parts, expected["pixel_values"][0], strict=True):
        ours = preprocess_image(part, 31, HALF, HALF, "native")
        torch.testing.assert_close(ours, values[:, : ours.shape[1], : ours.shape[2]], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="cannot quarter a picture of 9 x 1 pixels"):
        quarter_picture(patterned(9, 1))


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (2, 4), (1, 1)])
def test_grids_of_tiles_are_those_of_internvl(least: int, most: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    sides = (5, 14, 28, 30, 56, 57, 100, 171, 448)
    chosen = set()
    for width in sides:
        for height in sides:
            grid = tile_grid(width, height, 28, least, most)
            assert grid == get_optimal_tiled_canvas((height, width), (28, 28), least, most)
            chosen.add(grid)
    assert len(chosen) > 2 or most == 1


def test_tiles_are_those_of_internvl() -> None:
    pictures = [patterned(*size) for size in (*SIZES, (10, 10))]  # the last is one tile
    options = {"size": {"height": 16, "width": 16}, "crop_to_patches": True, "min_patches": 1, "max_patches": 6}
    expected = reference("GotOcr2", pictures, **options)
    tiles = [tile_picture(picture, 16, 1, 6) for picture in pictures]
    assert [len(part) for part in tiles] == expected["num_patches"].tolist()
    assert len(tiles[-1]) == 1
    ours = torch.stack([preprocess_image(tile, 16) for part in tiles for tile in part])
    torch.testing.assert_close(ours, expected["pixel_values"], atol=1e-6, rtol=0)
    assert len(tile_picture(pictures[1], 16, 1, 6, thumbnail=False)) == len(tiles[1]) - 1


def test_unknown_ways_to_size_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no fit 'squash' of pictures: choose one of stretch, crop, pad, native"):
        preprocess_image(patterned(3, 3), 2, fit="squash")
    with pytest.raises(ValueError, match="no filter 'box': choose one of bicubic, bilinear"):
        preprocess_image(patterned(3, 3), 2, resample="box")
