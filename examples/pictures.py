"""Thumbnails: each picture goes to the least loaded worker (mode any).

The payload is the bytes of a picture file, the result those of a JPEG file. Needs Pillow. Runs in
its own processes (`"run": "process"`), so that a picture that takes too long or crashes the decoder
fails only its own request.

Option of the handler, or of one process:

    size  "WIDTHxHEIGHT", default "160x160": the picture fits into it, undistorted, never enlarged
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as e:
    raise ImportError(
        f"the pictures example needs Pillow 11 or later; python -m pip install pillow ({e})"
    ) from None

from overlay import BadRequest

# An explicit list, because Pillow supports formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # 192 MB when decoded; a small file can claim to have far more
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def thumbnail(payload: bytes, context: Any) -> bytes:
    """A JPEG of the picture, rotated as its camera recorded; transparent areas become white.

    An animation gives its first frame. No metadata is kept, such as the location. Raises BadRequest
    for a file that is not a picture, damaged or too large; ValueError for an invalid option.
    """
    box = _box(str(context.options.get("size", "160x160")))
    try:
        small = _fitted(_opened(payload), box)
    except UnidentifiedImageError:
        raise BadRequest(f"{len(payload)} bytes that are no {' or '.join(FORMATS)} file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadRequest(f"the picture is too large: {e}") from None
    except (OSError, SyntaxError, EOFError) as e:  # Pillow's errors for a truncated file
        raise BadRequest(f"the picture is damaged: {e}") from None
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def _box(size: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", size)
    if not numbers:
        raise ValueError(f"option size: '{size}' is not like \"160x160\"")
    return int(numbers[1]), int(numbers[2])


def _opened(payload: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow only warns up to twice MAX_IMAGE_PIXELS; here that is an error too.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(payload), formats=FORMATS)


def _fitted(image: Image.Image, box: tuple[int, int]) -> Image.Image:
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size: less work, and enough for a thumbnail.
    image.draft(None, (2 * max(box), 2 * max(box)))
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow would clip 16-bit values at 255
        upright = upright.point(lambda value: value * (1 / 256)).convert("L")
    flat = _on_white(upright) if upright.has_transparency_data else upright.convert("RGB")
    flat.thumbnail(box)
    flat.info.clear()  # otherwise the JPEG would have the file's comment
    return flat


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")
