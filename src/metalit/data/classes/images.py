"""Images of files, as a network takes them: each of one size, in grey or in colours, of 8 bits."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metalit.data.files import check_file, shown
from metalit.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "PDF", "EPS", "WMF"}  # which Pillow names, but does not open alone
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def image_suffixes() -> set[str]:
    """The ends of names of the files that Pillow opens, in lower case, such as ``.png``."""
    from PIL import Image

    known = Image.registered_extensions()
    return {suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in _NO_PICTURES}


def read_image(file: str | Path, shape: Sequence[int], owner: str = "image") -> np.ndarray:
    """Read an image file as tasks of classes do.

    It is turned as its camera says, laid on white where it is transparent, and resized to the shape, whatever its
    proportions. Grey images of 16 bits keep their upper 8.

    Args:
        file: of any format that Pillow reads.
        shape: ``[channels, height, width]``; 1 channel of grey or 3 of red, green and blue.
        owner: the argument that names it, for messages.

    Returns:
        ``[channels, height, width]`` of ``uint8``.

    Raises:
        InputError: there is no such file; it is no image or a broken one.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    path = check_file(file, owner)
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * max(height, width),) * 2)  # a large JPEG is decoded at a fraction of its size
            # in this order: a palette would be resized by its numbers
            plain = _of_8_bits(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
            pixels = np.asarray(plain.resize((width, height), Image.Resampling.BILINEAR))
    except InputError as error:
        raise InputError(f"{owner}={shown(str(file))} {error}") from None
    except Exception as cause:  # each format has errors of its own
        raise InputError(
            f"{owner}={shown(str(file))} is no image that can be read ({_cause(cause)}); mend or remove the file"
        ) from None
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _of_8_bits(image: "Image", mode: str) -> "Image":
    from PIL import Image

    if image.mode in _GREY_16:
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError("has more than 16 bits for each pixel; save it with 8 or 16")
        image = Image.fromarray((values // 256).astype(np.uint8))
    if image.mode == "F":
        raise InputError("has pixels that are no whole numbers; save it with 8 or 16 bits for each")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image.convert("RGB").convert(mode) if image.mode not in ("1", "L") else image.convert(mode)


def _cause(cause: Exception) -> str:
    """The reason in one line, without the name of the file."""
    from PIL import UnidentifiedImageError

    if isinstance(cause, UnidentifiedImageError):
        return "of no format that Pillow knows"
    return getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(cause).__name__
