"""Files that are sent as images: name -> (bytes, status, code); the code of a sensible answer is ""."""

import io
import struct
import zlib
from typing import Any

from PIL import Image


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(size)
    return ramp.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes) -> bytes:
    """A PNG whose header promises this size, whatever `data` holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def animated() -> bytes:
    frames = [picture("P"), picture("P").transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


JPEG = encoded(picture(size=(400, 300)), "JPEG", quality=95)
PNG = encoded(picture(), "PNG")

CASES: dict[str, tuple[bytes, int, str]] = {
    # nothing anyone could show
    "empty": (b"", 422, "image_empty"),
    "text": (b"this is not a picture", 415, "image_invalid"),
    "zeros": (bytes(1000), 415, "image_invalid"),
    "a page": (b"<!DOCTYPE html><html><body>404</body></html>", 415, "image_invalid"),
    "a drawing": (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', 415, "image_unsupported"),
    "a document": (b"%PDF-1.7\n", 415, "image_unsupported"),
    "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix", 415, "image_invalid"),
    "only a PNG's first bytes": (PNG[:8], 415, "image_invalid"),
    "a JPEG cut short": (JPEG[: len(JPEG) // 2], 422, "image_truncated"),
    "a PNG cut short": (PNG[: len(PNG) - 40], 422, "image_truncated"),
    "a PNG with broken data": (png_of(40, 30, b"no zlib stream"), 415, "image_invalid"),
    "60,000 x 60,000 pixels": (png_of(60_000, 60_000, zlib.compress(b"")), 413, "image_too_many_pixels"),
    "2,147,483,647 pixels wide": (png_of(2**31 - 1, 1, zlib.compress(b"")), 413, "image_too_many_pixels"),
    "21 MiB": (b"\x89PNG\r\n\x1a\n" + bytes(21 * 2**20), 413, "image_too_large"),
    # unusual, and good
    "one pixel": (encoded(picture("RGB", (1, 1)), "PNG"), 200, ""),
    "one row": (encoded(picture("RGB", (500, 1)), "PNG"), 200, ""),
    "black and white": (encoded(picture("1"), "PNG"), 200, ""),
    "grey": (encoded(picture("L"), "JPEG"), 200, ""),
    "grey, transparent": (encoded(picture("LA"), "PNG"), 200, ""),
    "16 bits": (encoded(Image.new("I;16", (40, 30), 40_000), "PNG"), 200, ""),
    "palette": (encoded(picture("P"), "PNG"), 200, ""),
    "CMYK": (encoded(picture("CMYK"), "JPEG"), 200, ""),
    "rotated by EXIF": (rotated(), 200, ""),
    "animated": (animated(), 200, ""),
    "WebP": (encoded(picture(), "WEBP"), 200, ""),
    "TIFF": (encoded(picture(), "TIFF"), 200, ""),
}
