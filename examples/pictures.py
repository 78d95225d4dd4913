"""Thumbnails: each picture goes to the one worker that has the least to do (mode any).

The payload is a picture file's bytes, the result a JPEG file's. Needs Pillow. Runs in processes of
its own (`"run": "process"`), so that a picture that takes too long or crashes the decoder costs
that one request only.

Option, of the handler or of one process:

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

# Named, because Pillow knows formats that start other programs (EPS) and some that nobody sends.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # 192 MB when unpacked; a small file can claim to be far more
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def thumbnail(payload: bytes, context: Any) -> bytes:
    """A JPEG of the picture, upright as its camera meant it; what is transparent becomes white.

    Of an animation the first picture. Nothing else of the file is kept, such as where it was taken.
    Raises BadRequest for what is no picture, a damaged or an enormous one; ValueError for an option
    that cannot be right.
    """
    box = _box(str(context.options.get("size", "160x160")))
    try:
        small = _fitted(_opened(payload), box)
    except UnidentifiedImageError:
        raise BadRequest(f"{len(payload)} bytes that are no {' or '.join(FORMATS)} file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadRequest(f"the picture is too large: {e}") from None
    except (OSError, SyntaxError, EOFError) as e:  # Pillow's words for a file that ends too early
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
        # Pillow warns up to twice MAX_IMAGE_PIXELS and refuses above; here both refuse.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(payload), formats=FORMATS)


def _fitted(image: Image.Image, box: tuple[int, int]) -> Image.Image:
    # A JPEG can be unpacked at half, a quarter or an eighth: less work, as good at this size.
    image.draft(None, (2 * max(box), 2 * max(box)))
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow would cut off what is brighter than 255 of 65,535
        upright = upright.point(lambda value: value * (1 / 256)).convert("L")
    flat = _on_white(upright) if upright.has_transparency_data else upright.convert("RGB")
    flat.thumbnail(box)
    flat.info.clear()  # or the JPEG would carry the file's comment on
    return flat


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")
