"""Files that are sent as images: name -> (bytes, status, code); the code of a sensible answer is ""."""

import io
import random
import struct
import zipfile
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
    "13 MiB": (b"\x89PNG\r\n\x1a\n" + bytes(13 * 2**20), 413, "image_too_large"),
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


def noisy(size: tuple[int, int] = (40, 30)) -> Image.Image:
    """The same every time, and hard to compress."""
    count = size[0] * size[1] * 3
    return Image.frombytes("RGB", size, random.Random(0).randbytes(count))


def jpeg_with(segment: bytes, marker: int = 0xE1) -> bytes:
    """A good JPEG with one more segment in front."""
    return b"\xff\xd8" + struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment + JPEG[2:]


def jpeg_of(width: int, height: int) -> bytes:
    """A good JPEG whose header is changed to promise another size."""
    start = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:start] + struct.pack(">HH", height, width) + JPEG[start + 4 :]


def exif(orientation: object, kind: int = 3) -> bytes:
    """EXIF with one entry, of whatever type and value."""
    value = orientation if isinstance(orientation, bytes) else struct.pack("<HH", orientation, 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def png_with(kind: bytes, data: bytes, good: bytes = PNG) -> bytes:
    """A good PNG with one more chunk behind its header."""
    return good[:33] + chunk(kind, data) + good[33:]


def png_with_palette(colours: bytes) -> bytes:
    """4 x 4 pixels of palette entries 0 to 3."""
    header = struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)
    data = zlib.compress(b"\0\0\1\2\3" * 4)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, content)
        for kind, content in ((b"IHDR", header), (b"PLTE", colours), (b"IDAT", data), (b"IEND", b""))
    )


def bmp_of(width: int, height: int, bits: int = 24, data: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + header + data


def gif_of(width: int, height: int, frames: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frames + b";"


GIF_FRAME = b",\0\0\0\0\x02\0\x02\0\0\x02\x03\x44\x74\x05\0"  # 2 x 2 pixels


def tiff_of(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A TIFF of a directory alone. entries: (tag, type, count, value). following: where the next one lies."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + struct.pack("<I", following)


def webp_of(width: int, height: int) -> bytes:
    """An extended WebP whose canvas has this size, and nothing on it."""
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def apng() -> bytes:
    frames = [noisy(), picture()]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../etc/cron.d/x", "* * * * * root true")
    return buffer.getvalue()


CASES |= {
    # more inside than outside
    "a PNG of 20 kB that becomes 16 megapixels": (png_of(4000, 4000, zlib.compress(bytes(4001 * 4000), 9)), 200, ""),
    "a PNG whose data is far more than its header says (the rest is left)": (
        png_of(40, 30, zlib.compress(bytes(20 * 2**20), 9)),
        200,
        "",
    ),
    "a PNG whose data is less than its header says": (
        png_of(400, 300, zlib.compress(bytes(100))),
        422,
        "image_truncated",
    ),
    "a PNG with a comment that becomes 20 MB": (
        png_with(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20 * 2**20), 9)),
        415,
        "image_invalid",
    ),
    "a PNG with a colour profile that becomes 20 MB": (
        png_with(b"iCCP", b"icc\0\0" + zlib.compress(bytes(20 * 2**20), 9)),
        415,
        "image_invalid",
    ),
    "a PNG with 20,000 comments": (PNG[:33] + chunk(b"tEXt", b"a\0b") * 20_000 + PNG[33:], 200, ""),
    "a WebP with an empty canvas of 16,384 x 16,384": (webp_of(16_384, 16_384), 413, "image_too_many_pixels"),
    "a JPEG that promises 65,500 x 65,500": (jpeg_of(65_500, 65_500), 413, "image_too_many_pixels"),
    # headers that lie
    "a JPEG that promises more than it holds (the rest is grey)": (jpeg_of(800, 600), 200, ""),
    "a JPEG without width": (jpeg_of(0, 300), 415, "image_invalid"),
    "a PNG of no pixels": (png_of(0, 0, zlib.compress(b"")), 415, "image_invalid"),
    "a PNG with a wrong checksum": (PNG[:30] + b"\0\0\0" + PNG[33:], 415, "image_invalid"),
    "a PNG chunk that promises 2 GB, and holds what is needed": (
        PNG[:33] + b"\x7f\xff\xff\xffIDAT" + PNG[41:],
        200,
        "",
    ),
    "a PNG without an end": (PNG[:-12], 200, ""),
    "a BMP of negative height": (bmp_of(4, -4, data=bytes(48)), 200, ""),
    "a BMP of the most negative height": (bmp_of(1, -(2**31)), 413, "image_too_many_pixels"),
    "a BMP of negative width": (bmp_of(-4, 4, data=bytes(48)), 413, "image_too_many_pixels"),
    "a BMP of 33 bits": (bmp_of(4, 4, bits=33, data=bytes(99)), 415, "image_invalid"),
    "a BMP without its pixels": (bmp_of(1000, 1000), 422, "image_truncated"),
    "a GIF of no pixels, and a frame of four": (gif_of(0, 0, GIF_FRAME), 200, ""),
    "a GIF without a frame": (gif_of(2, 2, b""), 415, "image_invalid"),
    "a GIF cut inside its frame": (gif_of(2, 2, GIF_FRAME[:12]), 422, "image_truncated"),
    "a TIFF whose directory is its own successor": (
        tiff_of((256, 3, 1, 4), (257, 3, 1, 4), following=8),
        415,
        "image_invalid",
    ),
    "a TIFF of a directory that is not there": (b"II*\0\xff\xff\xff\x7f", 415, "image_invalid"),
    "a TIFF of 65,535 entries that are not there": (b"II*\0\x08\0\0\0\xff\xff", 415, "image_invalid"),
    "a TIFF whose tag has two thousand million values": (
        tiff_of((256, 3, 2**31, 8), (257, 3, 1, 4)),
        415,
        "image_invalid",
    ),
    "a TIFF whose pixels lie beyond its end": (
        tiff_of(
            (256, 3, 1, 4),
            (257, 3, 1, 4),
            (258, 3, 1, 8),
            (259, 3, 1, 1),
            (262, 3, 1, 1),
            (273, 4, 1, 2**31),
            (278, 3, 1, 4),
            (279, 4, 1, 16),
        ),
        422,
        "image_truncated",
    ),
    "a WebP cut short": (encoded(noisy(), "WEBP")[:60], 415, "image_invalid"),
    # several things at once
    "a PNG's first bytes, then a JPEG": (PNG[:8] + JPEG, 415, "image_invalid"),
    "a JPEG, then an archive that leaves its folder": (JPEG + zipped(), 200, ""),
    "an archive, then a PNG": (zipped() + PNG, 415, "image_invalid"),
    "a PNG, then a script": (PNG + b"<?php system($_GET[0]); ?>", 200, ""),
    "a GIF that is also a script": (b"GIF89a=1;" + b"\0" * 20, 415, "image_invalid"),
    "a JPEG with a page in its comment": (jpeg_with(b"<script>alert(1)</script>", 0xFE), 200, ""),
    # frames
    "an APNG of two frames": (apng(), 200, ""),
    "an APNG that counts its frames wrongly": (png_with(b"acTL", struct.pack(">II", 2**31 - 1, 0)), 200, ""),
    "a GIF of 1,000 frames": (gif_of(2, 2, GIF_FRAME * 1000), 200, ""),
    "a GIF whose frame is larger than it is": (gif_of(1, 1, GIF_FRAME), 200, ""),
    "a GIF whose second frame is cut": (gif_of(2, 2, GIF_FRAME + GIF_FRAME[:10]), 200, ""),
    # EXIF
    "EXIF that says orientation 99": (jpeg_with(exif(99)), 200, ""),
    "EXIF that says orientation 0": (jpeg_with(exif(0)), 200, ""),
    "EXIF whose orientation is a word": (jpeg_with(exif(b"six\0", kind=2)), 200, ""),
    "EXIF whose orientation divides by zero": (jpeg_with(exif(struct.pack("<I", 8), kind=5)), 200, ""),
    "EXIF that is noise": (jpeg_with(b"Exif\0\0" + random.Random(0).randbytes(60_000)), 200, ""),
    "EXIF that points behind its end": (jpeg_with(b"Exif\0\0II*\0\xff\xff\xff\x7f"), 200, ""),
    "EXIF of 5,000 entries that are all alike": (
        jpeg_with(b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + exif(6)[16:28] * 5000 + bytes(4)),
        200,
        "",
    ),
    # sorts of pixels
    "a CIELAB TIFF": (encoded(Image.new("LAB", (8, 8)), "TIFF"), 200, ""),
    "a TIFF of floating-point numbers": (encoded(Image.new("F", (8, 8)), "TIFF"), 415, "image_unsupported"),
    "a TIFF of 32-bit numbers": (encoded(Image.new("I", (8, 8)), "TIFF"), 415, "image_unsupported"),
    "a TIFF of two pages": (encoded(noisy(), "TIFF", save_all=True, append_images=[picture()]), 200, ""),
    "a palette without its colours": (png_with_palette(b""), 200, ""),
    "a palette of one colour, and pixels of others": (png_with_palette(b"\xff\0\0"), 200, ""),
    "an animated WebP": (encoded(noisy(), "WEBP", save_all=True, append_images=[picture()]), 200, ""),
    # sizes
    "a strip of 4,000,000 x 1 pixels": (png_of(4_000_000, 1, zlib.compress(bytes(4_000_001), 9)), 200, ""),
    "a strip of 1 x 4,000,000 pixels": (png_of(1, 4_000_000, zlib.compress(bytes(8_000_000), 9)), 200, ""),
}
