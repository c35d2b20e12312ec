"""Rows of images fit on their page, and headings stand apart."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from metalit.callbacks.tiles import Row, Tile, draw_rows


@pytest.mark.parametrize(("examples", "others"), [(1, 1), (1, 9), (1, 14), (3, 2)])
def test_headings_stand_apart_and_images_on_the_page(examples, others):
    tile = Tile(np.zeros((1, 4, 4)))
    figure = draw_rows([Row("a", [tile] * examples, [tile] * others)], "", ("examples", "taken for it"))
    canvas = FigureCanvasAgg(figure)
    (axes,) = figure.axes
    left, right = (
        next(text for text in axes.texts if text.get_text() == heading).get_window_extent(canvas.get_renderer())
        for heading in ("examples", "taken for it")
    )
    assert left.x1 < right.x0
    assert max(image.get_extent()[1] for image in axes.images) < figure.get_figwidth()
