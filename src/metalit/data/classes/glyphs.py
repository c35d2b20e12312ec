"""Characters of several alphabets, drawn with the fonts that come with Matplotlib."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metalit.data.classes.base import Classes, ClassSource
from metalit.errors import InputError
from metalit.keys import fold, uniform

_FONTS = ("DejaVu*.ttf", "STIXGeneral*.ttf")
_LETTERS = {"Lu", "Ll", "Lt", "Lo", "Nd"}
_ALPHABETS = {"DIGIT": "Latin"}  # as digits are written with it
_LEAST = 10  # characters of an alphabet
_EXAMPLES = 20
_PIXELS, _OVER = 28, 2  # drawn at twice the size, and averaged
_CANVAS, _FONT = 4 * _PIXELS, 20 * _OVER


@dataclass(frozen=True)
class Glyphs(ClassSource):
    """Printed characters, 28 × 28 and grey (white on black): each is a class of 20 examples, of an alphabet each.

    Examples are drawn with different faces (upright, bold and italic ones of DejaVu and STIX), as far as there are,
    each a little turned (10° at most), shifted (2 pixels) and scaled (by 0.8 to 1.1), by key. A character that looks
    like one of an earlier alphabet is left out, as a Greek Α is, so that no class is in two splits; so are letters
    that few faces have. It is shaped like Omniglot, whose characters are drawn by people, and accuracies on it say
    nothing about those on Omniglot.

    Args:
        faces: how many faces must have a character; fewer give more alphabets, whose examples are more alike.
        seed: the seed of turns, shifts and scales.

    Raises:
        InputError: ``faces`` is not from 1 to 10.
    """

    faces: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.faces <= 10:
            raise InputError(f"data.tasks.source.faces={self.faces} must be from 1 to 10: few letters are in more")

    def shape(self) -> Sequence[int]:
        """One channel of 28 × 28."""
        return [1, _PIXELS, _PIXELS]

    def read_classes(self) -> Classes:
        """Draw all of them, some 25,000 pictures, in a few seconds."""
        faces = _faces()
        characters = _characters(faces, self.faces)
        codes = torch.tensor([ord(character) for character in characters])
        key = fold(torch.tensor(self.seed), codes[:, None], torch.arange(_EXAMPLES))
        chances = uniform(key, 4).tolist()
        values = np.empty((len(characters), _EXAMPLES, 1, _PIXELS, _PIXELS), dtype=np.uint8)
        for number, character in enumerate(characters):
            having = [font for font, known in faces if ord(character) in known]
            for example in range(_EXAMPLES):
                font = having[example % len(having)]
                values[number, example, 0] = _drawn(character, font, chances[number][example])
        groups = [_alphabet(character) for character in characters]
        names = [f"{group}/{character}" for group, character in zip(groups, characters, strict=True)]
        numbers = torch.arange(len(names)).repeat_interleave(_EXAMPLES)
        return Classes.of(names, numbers, values.reshape(-1, *self.shape()), groups)


def _faces() -> list[tuple[Any, set[int]]]:
    """Each face with the characters that it has."""
    # late: Matplotlib takes as long to import as torch
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

    folder = Path(get_data_path()) / "fonts" / "ttf"
    files = sorted(str(file) for pattern in _FONTS for file in folder.glob(pattern))
    layout = ImageFont.Layout.BASIC  # the same wherever it is drawn
    return [(ImageFont.truetype(file, _FONT, layout_engine=layout), {*FT2Font(file).get_charmap()}) for file in files]


def _characters(faces: list[tuple[Any, set[int]]], least: int) -> list[str]:
    """The letters and digits that enough faces have, without those that look like an earlier one."""
    found: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for code in sorted(set().union(*(known for _, known in faces))):
        character = chr(code)
        having = [font for font, known in faces if code in known]
        styled = unicodedata.decomposition(character).startswith("<font>")  # a Latin letter in a face of its own
        if len(having) < least or styled or unicodedata.category(character) not in _LETTERS:
            continue
        mask = having[0].getmask(character)
        look = (mask.size, bytes(mask))
        if look not in seen:
            seen.add(look)
            found[_alphabet(character)].append(character)
    return [character for characters in found.values() if len(characters) >= _LEAST for character in characters]


def _alphabet(character: str) -> str:
    script = unicodedata.name(character, "?").split()[0]
    return _ALPHABETS.get(script, script.capitalize())


def _drawn(character: str, font: Any, chances: list[float]) -> np.ndarray:
    """A character ``[28, 28]`` by four numbers from 0 to 1, which turn, shift (across and down) and scale it."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(canvas).text((_CANVAS / 2, _CANVAS / 2), character, fill=255, font=font, anchor="mm")
    box = canvas.getbbox() or (0, 0, _CANVAS, _CANVAS)
    reach = max(_CANVAS / 2 - min(box[:2]), max(box[2:]) - _CANVAS / 2) / _OVER
    angle = radians(20 * chances[0] - 10)
    across, down = (4 * chance - 2 for chance in chances[1:3])
    scale = min(0.8 + 0.3 * chances[3], (_PIXELS / 2 - 1) / reach)
    # Pillow asks of each pixel drawn where it lies on the canvas
    a, b = _OVER / scale * cos(angle), _OVER / scale * sin(angle)
    x, y = _PIXELS / 2 + across, _PIXELS / 2 + down
    middle = _CANVAS / 2
    matrix = (a, b, middle - a * x - b * y, -b, a, middle + b * x - a * y)
    return np.asarray(canvas.transform((_PIXELS, _PIXELS), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
