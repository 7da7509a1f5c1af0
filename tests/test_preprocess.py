"""Files -> pixels: equal to open_clip, and unshaken by what no one should send."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from pmgaft.clip.preprocess import (
    FORMATS,
    ImageLimits,
    PreprocessSpec,
    open_image,
    plan_image,
    read_pixels,
    resize,
    to_pixels,
)
from pmgaft.errors import ImageError

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.3, 0.35)


def spec(size: tuple[int, int] = (32, 32), **options: Any) -> PreprocessSpec:
    return PreprocessSpec(size=size, mean=MEAN, std=STD, **options)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def code_of(data: bytes | Path, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(data, ImageLimits(**limits))
    assert "\n" not in caught.value.message
    assert caught.value.field == "image"
    return caught.value.code


# --- equal to open_clip


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (17, 17)])
@pytest.mark.parametrize(
    "source", [(32, 32), (33, 64), (100, 37), (20, 20), (7, 90), (641, 427), (1, 1), (1, 30), (32, 33)]
)
def test_pixels_are_those_of_open_clips_validation_transform(
    resize_mode: Any, interpolation: Any, size: tuple[int, int], source: tuple[int, int]
) -> None:
    image = picture(*source)
    cfg = PreprocessCfg(size=size, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize_mode)
    theirs = image_transform_v2(cfg, is_train=False)(image)
    pixels = to_pixels(image, spec(size, resize_mode=resize_mode, interpolation=interpolation))
    ours = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, *size)
    assert torch.equal(ours, theirs)


def test_a_grey_file_gives_the_pixels_that_open_clip_gives() -> None:
    grey = picture(50, 70).convert("L")
    theirs = image_transform_v2(PreprocessCfg(size=32, mean=MEAN, std=STD), is_train=False)(grey)
    ours = to_pixels(open_image(encoded(grey)), spec())
    assert torch.equal((ours - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), theirs)


def test_real_photographs_too(photos: Path) -> None:
    transform = image_transform_v2(PreprocessCfg(size=96, mean=MEAN, std=STD), is_train=False)
    for file in sorted([*photos.glob("*.jpg"), *photos.glob("*.png")]):
        ours = to_pixels(open_image(file), spec((96, 96)))
        theirs = transform(Image.open(file))
        assert torch.equal((ours - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), theirs), (
            file.name
        )


@pytest.mark.parametrize("source", [(1, 4000), (4000, 1), (3, 2500), (2500, 2)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_of_a_thin_strip_only_what_is_kept_is_computed(
    source: tuple[int, int], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(*source).point(lambda value: 64 + value // 2)  # no clipping: Pillow's order of passes varies
    asked: list[tuple[int, int]] = []
    real = Image.Image.resize

    def watched(self: Image.Image, target: tuple[int, int], *rest: Any, **options: Any) -> Image.Image:
        asked.append(target)
        return real(self, target, *rest, **options)

    whole = image_transform_v2(PreprocessCfg(size=size, mean=(0, 0, 0), std=(1, 1, 1)), is_train=False)(image)
    monkeypatch.setattr(Image.Image, "resize", watched)
    pixels = to_pixels(image, spec(size))
    assert asked == [size[::-1]]
    assert (pixels - whole).abs().max() <= 2 / 255


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["shortest", "longest", "squash"]))
@settings(max_examples=60, deadline=None)
def test_any_picture_becomes_the_models_size(width: int, height: int, mode: Any) -> None:
    assert resize(picture(width, height), spec((16, 24), resize_mode=mode)).size == (24, 16)


# --- kinds of files


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "JPEG"])
def test_every_lossless_format_gives_the_same_pixels(kind: str) -> None:
    image = picture(20, 30)
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "GIF":
        image = image.quantize(64).convert("RGB").quantize(64).convert("RGB")
    assert np.array_equal(np.asarray(open_image(encoded(image, kind, **options))), np.asarray(image))


def test_bytes_and_path_give_the_same_picture(tmp_path: Path) -> None:
    content = encoded(picture(9, 8))
    (tmp_path / "a.png").write_bytes(content)
    assert open_image(tmp_path / "a.png").tobytes() == open_image(content).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_colour_mode_is_shown_as_rgb(mode: str) -> None:
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = Image.new("I;16", (8, 8), 40000) if mode == "I;16" else picture(8, 8).convert(mode)
    opened = open_image(encoded(image, kind))
    assert (opened.mode, opened.size) == ("RGB", (8, 8))


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    opened = np.asarray(open_image(encoded(Image.fromarray(ramp))))[..., 0]
    assert opened.min() == 0
    assert opened.max() == 255
    assert np.abs(opened - ramp / 257).max() <= 1


def test_sixteen_bit_colour_is_scaled_too() -> None:
    row = struct.pack(">6H", 65535, 32768, 0, 0, 65535, 257)
    png = _png(width=2, height=1, bits=16, colour=2, rows=b"\x00" + row)
    assert np.asarray(open_image(png)).tolist() == [[[255, 128, 0], [0, 255, 1]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        content = encoded(image, transparency=0)
    else:
        content = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode))
    assert np.asarray(open_image(content)).min() == 255


def test_of_an_animation_the_first_frame_is_taken() -> None:
    red, blue = Image.new("RGB", (5, 5), (255, 0, 0)), Image.new("RGB", (5, 5), (0, 0, 255))
    for kind in ("GIF", "WEBP"):
        content = encoded(red, kind, save_all=True, append_images=[blue], duration=100)
        pixel = open_image(content).getpixel((2, 2))
        assert isinstance(pixel, tuple)
        assert pixel[0] > 200
        assert pixel[2] < 60, kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    from PIL import ImageOps

    image = picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(open_image(content)), np.asarray(upright))


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00nonsense", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00MM\x00*"]
)
def test_broken_exif_does_not_refuse_a_good_picture(exif: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, about the EXIF data
        assert open_image(encoded(picture(6, 4), "JPEG", exif=exif)).size == (6, 4)


def test_one_pixel_is_a_picture() -> None:
    pixels = to_pixels(open_image(encoded(Image.new("RGB", (1, 1), (255, 0, 0)))), spec())
    assert pixels[0].min() == 1
    assert pixels[1:].max() == 0


# --- as served


def photograph(name: str, width: int) -> Image.Image:
    """One of scikit-image's photographs, enlarged to `width`, with a camera's noise."""
    package = importlib.util.find_spec("skimage")
    assert package is not None
    assert package.origin is not None
    image = Image.open(Path(package.origin).parent / "data" / name).convert("RGB")
    large = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 8, size=(large.height, large.width, 3))
    return Image.fromarray((np.asarray(large) + noise).clip(0, 255).astype(np.uint8))


def served_and_exact(content: bytes, how: PreprocessSpec) -> tuple[torch.Tensor, torch.Tensor]:
    return read_pixels(content, how), to_pixels(open_image(content), how)


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes at which pictures are decoded."""
    sizes: list[tuple[int, int]] = []
    load = JpegImageFile.load

    def watched(self: JpegImageFile) -> Any:
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", watched)
    return sizes


@pytest.mark.parametrize(("name", "width"), [("astronaut.png", 512), ("ihc.png", 1999), ("motorcycle_left.png", 2333)])
@pytest.mark.parametrize("side", [128, 224])
def test_a_large_jpeg_is_scaled_while_it_is_decoded_within_the_stated_tolerance(
    name: str, width: int, side: int, decoded_sizes: list[tuple[int, int]]
) -> None:
    content = encoded(photograph(name, width), "JPEG", quality=90)
    how = PreprocessSpec(size=(side, side), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    served = read_pixels(content, how)
    served_size = decoded_sizes[0]
    exact = to_pixels(open_image(content), how)
    difference = (served - exact).abs()
    assert difference.mean() <= 1 / 255
    assert difference.max() <= 16 / 255
    assert min(served_size) >= 2 * side
    assert (served_size[0] < width) == (width >= 4 * side)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_scaled_jpeg_is_upright_whatever_its_size_and_orientation(orientation: int, size: tuple[int, int]) -> None:
    smooth = picture(9, 7, seed=3).resize((333, 457), Image.Resampling.BICUBIC)  # odd: the last blocks are partial
    exif = Image.Exif()
    exif[0x0112] = orientation
    served, exact = served_and_exact(encoded(smooth, "JPEG", quality=95, exif=exif), spec(size))
    assert (served - exact).abs().max() <= 4 / 255


@pytest.mark.parametrize("mode", ["squash", "longest", "shortest"])
def test_a_scaled_jpeg_is_resized_as_the_model_asks(mode: Any) -> None:
    smooth = picture(9, 7, seed=3).resize((700, 401), Image.Resampling.BICUBIC)
    served, exact = served_and_exact(encoded(smooth, "JPEG", quality=95), spec((32, 32), resize_mode=mode))
    assert (served - exact).abs().max() <= 4 / 255


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "RGB"])
def test_a_scaled_jpeg_of_any_colours_is_rgb(mode: str) -> None:
    smooth = picture(9, 7, seed=3).resize((400, 400), Image.Resampling.BICUBIC).convert(mode)
    served, exact = served_and_exact(encoded(smooth, "JPEG", quality=95), spec())
    assert (served - exact).abs().max() <= 4 / 255


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_whatever_is_not_scaled_while_decoding_is_served_with_the_pixels_of_training(kind: str, mode: str) -> None:
    image = Image.new("I;16", (40, 50), 40000) if mode == "I;16" else picture(40, 50).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    try:
        content = encoded(image, kind, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
    except (OSError, ValueError):
        pytest.skip(f"{kind} holds no {mode}")
    served, exact = served_and_exact(content, spec())
    assert torch.equal(served, exact)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_cut_short_is_refused_when_served_as_it_is_in_training(kind: str) -> None:
    content = encoded(picture(400, 300), kind)[:-2000]
    codes = []
    for read in (open_image, lambda data: read_pixels(data, spec())):
        try:
            read(content)
            codes.append("none")
        except ImageError as error:
            codes.append(error.code)
    assert codes[0] == codes[1]


# --- what no one should send


def test_no_bytes() -> None:
    assert code_of(b"") == "image_empty"


def test_no_file(tmp_path: Path) -> None:
    assert code_of(tmp_path / "none.png") == "image_missing"
    assert code_of(tmp_path) == "image_missing"


@pytest.mark.parametrize(
    "junk", [b"hello", b"\x00" * 1000, b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP"]
)
def test_no_image(junk: bytes) -> None:
    assert code_of(junk) == "image_invalid"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00", "HEIC"),
        (b"\x00\x00\x00\x1cftypavif\x00\x00", "AVIF"),
        (b"\x00\x00\x00\x1cftypisom\x00\x00", "video"),
        (encoded(Image.new("RGB", (16, 16)), "ICO"), "icon"),
    ],
)
def test_another_kind_of_file_is_called_by_its_name(content: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"type {name}") as caught:
        open_image(content)
    assert caught.value.code == "image_unsupported"


@pytest.mark.parametrize("kind", ["PPM", "TGA", "EPS", "PCX", "SGI"])
def test_formats_that_are_not_on_the_list_are_not_even_tried(kind: str) -> None:
    assert code_of(encoded(picture(8, 8), kind)) == "image_invalid"


def test_thirty_two_bits_a_sample() -> None:
    assert code_of(encoded(Image.new("F", (4, 4), 0.5), "TIFF")) == "image_unsupported"


@pytest.mark.parametrize(("kind", "share"), [("JPEG", 0.5), ("PNG", 0.5), ("GIF", 0.5), ("BMP", 0.5), ("TIFF", 0.5)])
def test_a_file_that_ends_early(kind: str, share: float) -> None:
    content = encoded(picture(64, 64), kind)
    assert code_of(content[: int(len(content) * share)]) in ("image_truncated", "image_invalid")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_a_cut_off_picture_is_told_so(kind: str) -> None:
    content = encoded(picture(64, 64), kind)
    assert code_of(content[: len(content) // 2]) == "image_truncated"


def test_more_bytes_than_allowed(tmp_path: Path) -> None:
    content = encoded(picture(64, 64))
    assert code_of(content, bytes=1000) == "image_too_large"
    (tmp_path / "a.png").write_bytes(content)
    assert code_of(tmp_path / "a.png", bytes=1000) == "image_too_large"


def test_a_huge_file_is_not_read_before_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(64, 64)))

    def read_bytes(self: Path) -> bytes:
        raise AssertionError("read")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert code_of(tmp_path / "a.png", bytes=1000) == "image_too_large"


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_from_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    bomb = _png(width=side, height=side, bits=8, colour=2, rows=b"\x00" * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert code_of(bomb) == "image_too_many_pixels"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code_of(bomb) == "image_too_many_pixels"


def test_what_decoding_costs_is_bounded_and_a_jpeg_that_is_scaled_meanwhile_counts_a_third_or_half() -> None:
    spec = PreprocessSpec(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    large, small = picture(200, 160), picture(64, 50)
    files = {"PNG": encoded(large), "JPEG": encoded(large, "JPEG"), "small JPEG": encoded(small, "JPEG")}
    files["progressive JPEG"] = encoded(large, "JPEG", progressive=True)
    costs = {"PNG": 200 * 160, "progressive JPEG": 200 * 160 // 2, "JPEG": 200 * 160 // 3, "small JPEG": 64 * 50}
    assert {name: plan_image(content, spec).pixels_to_decode for name, content in files.items()} == costs
    for name, content in files.items():
        read_pixels(content, spec, ImageLimits(decoded=costs[name]))
        with pytest.raises(ImageError, match="pixels to decode") as refused:
            read_pixels(content, spec, ImageLimits(decoded=costs[name] - 1))
        assert refused.value.code == "image_too_many_pixels"


def test_a_text_chunk_that_unpacks_to_gigabytes() -> None:
    packed = zlib.compress(b"x" * 80_000_000)
    chunk = _chunk(b"zTXt", b"Comment\x00\x00" + packed)
    content = encoded(picture(8, 8))
    assert code_of(content[:33] + chunk + content[33:]) == "image_invalid"


@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from(FORMATS))
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_give_a_picture_or_an_image_error(noise: bytes, position: int, kind: str) -> None:
    content = bytearray(encoded(picture(12, 12), kind))
    content[position : position + len(noise)] = noise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            assert open_image(bytes(content), ImageLimits(pixels=10**6)).mode == "RGB"


def _png(*, width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
