"""File or bytes -> pixels: the one path that training, evaluation and serving all use.

Imports PIL, numpy and torch alone, so that a serving worker can use it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pmgaft.errors import ImageError

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "squash", "longest"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_FORMATS_TEXT = "send a JPEG, PNG, WEBP, GIF, BMP or TIFF file"
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHITE = (255, 255, 255)

# What people send by mistake, told by its first bytes: (offset, bytes, name).
_OTHER_FORMATS = (
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML or SVG"),
    (0, b"\x00\x00\x01\x00", "icon"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (8, b"heic", "HEIC"),
    (8, b"mif1", "HEIC"),
    (8, b"avif", "AVIF"),
    (4, b"ftyp", "video"),
)

_DRAFTED = ("JPEG", "MPO")  # can be decoded at a fraction of their size

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # orientations by which rows become columns

# A thin strip would be resized to a huge one and then cropped; past this many times the model's area only what the crop
# keeps is computed.
_LARGEST_RESIZED = 64
_DRAFT_SAVES = 3  # at least: of the time that decoding takes
_DRAFT_SAVES_PROGRESSIVE = 2  # whose coefficients are all read, several times


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSpec:
    """How a picture becomes the model's input; the words are open_clip's.

    size: (H, W). mean, std: of the normalisation that PixelEncoder applies.
    resize_mode: "shortest" (then crop the centre), "longest" (then pad with black), "squash".
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What is refused before it is decoded.

    bytes: of the file. pixels: of the picture. decoded: pixels that decoding costs as much as, which are the picture's,
    or a third of them where a JPEG is scaled while it is decoded, half of them if it is progressive.
    """

    bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    decoded: int = 50_000_000


def open_image(data: bytes | Path, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """The picture as upright RGB: EXIF orientation applied, first frame, transparency over white, 16 bits scaled to 8.

    The size is read from the header, and refused if over the limits, before any pixel is decoded.
    Raises: ImageError (image_missing, image_empty, image_too_large, image_too_many_pixels, image_truncated,
    image_unsupported, image_invalid); nothing else, whatever the bytes.
    """
    return _finish(_header(data, limits))


def to_pixels(image: Image.Image, spec: PreprocessSpec) -> Tensor:
    """image: RGB -> float32 [3, H, W] in [0, 1], equal to open_clip's validation transform before its Normalize."""
    return _as_tensor(resize(image, spec))


def read_pixels(data: bytes, spec: PreprocessSpec, limits: ImageLimits = ImageLimits()) -> Tensor:
    """`to_pixels(open_image(data))`, in a fraction of the time for large JPEGs: float32 [3, H, W] in [0, 1].

    A JPEG of at least four times the size it is resized to is decoded at 1/2, 1/4 or 1/8 of its own, at least twice
    that size being left; everything else takes the exact path. Tolerance, on photographs: pixels differ by less than
    one of 255 grey levels on average, and by 16 at most.
    Raises: as `open_image`.
    """
    return read_planned(plan_image(data, spec, limits), spec)


def plan_image(data: bytes, spec: PreprocessSpec, limits: ImageLimits = ImageLimits()) -> PlannedImage:
    """The first half of `read_pixels`: the header is read, nothing is decoded. Raises: as `open_image`."""
    image = _header(data, limits)
    pixels = image.width * image.height
    draft = _draft(image, spec)
    saved = _DRAFT_SAVES_PROGRESSIVE if image.info.get("progressive") else _DRAFT_SAVES
    cost = pixels if draft is None else pixels // saved
    if cost > limits.decoded:
        message = f"the image has {cost:,} pixels to decode; at most {limits.decoded:,} are allowed"
        raise _image_error("image_too_many_pixels", message)
    return PlannedImage(image, draft, cost)


def read_planned(planned: PlannedImage, spec: PreprocessSpec) -> Tensor:
    """The second half of `read_pixels`, once for each plan.

    Raises: ImageError (image_truncated, image_invalid, image_unsupported).
    """
    image, draft = planned.image, planned.draft
    try:
        if draft is None:
            return to_pixels(_finish(image), spec)
        _load(image)
        small = _to_rgb(image).resize(draft.stored, _RESAMPLING[interpolation_of(spec)], box=draft.box)
        return _as_tensor(_crop_or_pad(_upright(small, draft.orientation), spec.size[1], spec.size[0]))
    finally:
        image.close()  # which frees its pixels, however long the plan is kept


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """A picture whose header was read. pixels_to_decode: what decoding it costs, as ImageLimits.decoded counts."""

    image: Image.Image
    draft: Draft | None
    pixels_to_decode: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A JPEG that will be scaled while it is decoded.

    stored: (width, height) it is resized to, as it lies in the file. box: what the picture takes of what is decoded,
    whose last column and row may be partial.
    """

    stored: tuple[int, int]
    box: tuple[float, float, float, float]
    orientation: int


def _draft(image: Image.Image, spec: PreprocessSpec) -> Draft | None:
    """How a JPEG that is large enough will be scaled while it is decoded, which it is told here."""
    if image.format not in _DRAFTED:
        return None
    whole, orientation = image.size, _orientation(image)
    turned = orientation in _TURNED
    scaled = scaled_size(whole[::-1] if turned else whole, spec)
    stored = scaled[::-1] if turned else scaled
    drafted = image.draft(None, (2 * stored[0], 2 * stored[1]))
    if drafted is None or image.size == whole:
        return None
    return Draft(stored, drafted[1], orientation)


def _header(data: bytes | Path, limits: ImageLimits) -> Image.Image:
    """The picture, not decoded yet. Raises: ImageError, as `open_image` does."""
    content = _read(data, limits) if isinstance(data, Path) else data
    if not content:
        raise _image_error("image_empty", "the image is empty (0 bytes)")
    if len(content) > limits.bytes:
        raise _too_large(len(content), limits)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _image_error("image_too_many_pixels", f"the image has more than {limits.pixels:,} pixels") from error
    except Exception as error:  # decoders raise about anything on hostile bytes
        raise _not_an_image(content, error) from error
    if image.width * image.height > limits.pixels:
        message = f"the image has {image.width} x {image.height} pixels; at most {limits.pixels:,} are allowed"
        raise _image_error("image_too_many_pixels", message)
    return image


def _finish(image: Image.Image) -> Image.Image:
    """Decoded, upright RGB."""
    _load(image)
    return _upright(_to_rgb(image), _orientation(image))


def _load(image: Image.Image) -> None:
    """Decode. Raises: ImageError (image_truncated, image_invalid)."""
    try:
        image.load()
    except Exception as error:  # as above
        if "truncated" in str(error).lower():
            message = "the image ends early: part of the file is missing"
            raise _image_error("image_truncated", message) from error
        raise _image_error("image_invalid", f"the {image.format} image is damaged and cannot be decoded") from error


def _as_tensor(image: Image.Image) -> Tensor:
    """RGB -> float32 [3, H, W] in [0, 1]. By numpy: torch's threads would cost more than the work."""
    pixels = np.empty((3, image.height, image.width), dtype=np.float32)
    np.divide(np.asarray(image).transpose(2, 0, 1), np.float32(255), out=pixels)
    return torch.from_numpy(pixels)


def resize(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """image: RGB -> RGB of exactly spec.size, as spec.resize_mode says."""
    height, width = spec.size
    scaled, resampling = scaled_size(image.size, spec), _RESAMPLING[interpolation_of(spec)]
    if spec.resize_mode == "shortest" and scaled[0] * scaled[1] > _LARGEST_RESIZED * width * height:
        return _resize_centre(image, scaled, spec.size, resampling)
    return _crop_or_pad(image.resize(scaled, resampling), width, height)


def scaled_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """(width, height) that a picture of `size` (width, height) is resized to, before its centre is cut out or black is
    added around it.
    """
    height, width = spec.size
    if spec.resize_mode == "squash":
        return width, height
    if spec.resize_mode == "longest":
        ratio = max(size[1] / height, size[0] / width)
        return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
    if height == width:
        return _shortest_side(size, width)
    ratio = min(size[1] / height, size[0] / width)  # open_clip rounds instead of cutting here
    return round(size[0] / ratio), round(size[1] / ratio)


def interpolation_of(spec: PreprocessSpec) -> Interpolation:
    """What is really used: open_clip always takes bicubic where "shortest" meets an input that is not square."""
    square = spec.size[0] == spec.size[1]
    return "bicubic" if spec.resize_mode == "shortest" and not square else spec.interpolation


def _shortest_side(size: tuple[int, int], target: int) -> tuple[int, int]:
    """(width, height) after torchvision's Resize(target): the shorter side exact, the longer cut to an integer."""
    width, height = size
    if width <= height:
        return target, int(target * height / width)
    return int(target * width / height), target


def _crop_or_pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """The centre, with black borders where the picture is smaller; offsets rounded as torchvision does."""
    if image.width < width or image.height < height:
        canvas = Image.new("RGB", (max(image.width, width), max(image.height, height)))
        canvas.paste(image, (max(0, width - image.width) // 2, max(0, height - image.height) // 2))
        image = canvas
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _resize_centre(
    image: Image.Image, scaled: tuple[int, int], size: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    """What resizing to `scaled` and cropping the centre of `size` (H, W) would give, without the rest."""
    height, width = size
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    x, y = image.width / scaled[0], image.height / scaled[1]
    box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    return image.resize((width, height), resampling, box=box)


def _read(path: Path, limits: ImageLimits) -> bytes:
    try:
        size = path.stat().st_size
        if size > limits.bytes:
            raise _too_large(size, limits)
        return path.read_bytes()
    except OSError as error:
        raise _image_error("image_missing", f"cannot read {path}: {error.strerror or error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        eight_bits = np.asarray(image).astype(np.uint32) * 255 // 65535
        return Image.fromarray(eight_bits.astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("I", "F"):
        message = "the image has 32 bits a sample; convert it to 8 or 16 bits"
        raise _image_error("image_unsupported", message)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*_WHITE, 255)), layer).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        message = f"colour mode {image.mode} cannot be shown as RGB"
        raise _image_error("image_unsupported", message) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF must not refuse a good picture
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _not_an_image(content: bytes, error: Exception) -> ImageError:
    for offset, magic, name in _OTHER_FORMATS:
        if content[offset : offset + len(magic)] == magic:
            return _image_error("image_unsupported", f"this looks like a file of type {name}; {_FORMATS_TEXT}")
    if isinstance(error, UnidentifiedImageError):
        return _image_error("image_invalid", f"this is not an image that can be read; {_FORMATS_TEXT}")
    return _image_error("image_invalid", "the image's header is damaged")


def _too_large(size: int, limits: ImageLimits) -> ImageError:
    return _image_error("image_too_large", f"the image has {size:,} bytes; at most {limits.bytes:,} are allowed")


def _image_error(code: str, message: str) -> ImageError:
    return ImageError(message, field="image", code=code)
