"""Folders of small pictures, shaped like those that people have."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def omniglot_like(folder: Path, alphabets: int = 5, characters: int = 4, examples: int = 20, side: int = 105) -> Path:
    """Folders alphabet/character of grey PNGs: each character is a stroke of its own, drawn a little otherwise."""
    rng = np.random.default_rng(0)
    for alphabet in range(alphabets):
        for character in range(1, characters + 1):
            place = folder / f"Alphabet_{alphabet}" / f"character{character:02d}"
            place.mkdir(parents=True)
            corners = rng.uniform(0.15, 0.85, (4, 2))
            for example in range(1, examples + 1):
                picture = Image.new("L", (side, side), 255)
                stroke = [tuple(side * (corner + rng.normal(0, 0.02, 2))) for corner in corners]
                ImageDraw.Draw(picture).line(stroke, fill=0, width=max(1, side // 35))
                picture.save(place / f"{alphabet:02d}{character:02d}_{example:02d}.png")
    return folder
