"""A picture of the errors by inner step: the learner's as a curve in its interval, those of baselines as lines."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import isfinite
from typing import TYPE_CHECKING

from metalit.callbacks.drawing import COLOURS, labelled, literal, panels
from metalit.evaluation.interval import Interval
from metalit.evaluation.report import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = 4  # the numbers of more measures are in the table


def draw_errors(chart: Chart) -> "Figure":
    """Draw the means over tasks after each number of inner steps, one panel for each measure.

    The limits hold the learner before adapting and the baselines; where inner steps diverge, the curve leaves them.

    Args:
        chart: the learner first, then the baselines.
    """
    figure, places = panels(min(len(chart), _PANELS))
    for axes, (heading, predictors) in zip(places, chart.items(), strict=False):
        _draw_measure(axes, heading, predictors)
    labelled(figure, places, "inner steps", "", "top")
    return figure


def _draw_measure(axes: "Axes", heading: str, predictors: Mapping[str, Sequence[Interval]]) -> None:
    (learner, by_step), *baselines = predictors.items()
    colours = cycle(COLOURS)
    axes.plot([each.mean for each in by_step], marker="o", color=(colour := next(colours)), label=learner, zorder=3)
    if len(by_step) > 1:
        axes.fill_between(range(len(by_step)), *_band(by_step), color=colour, alpha=0.2, linewidth=0)
    else:
        axes.vlines(0, *_band(by_step), color=colour, alpha=0.4, linewidth=4)
    for (name, (interval,)), colour, dashes in zip(baselines, colours, cycle(("--", "-.", ":")), strict=False):
        axes.axhline(interval.mean, color=colour, linestyle=dashes, label=literal(name))
        axes.axhspan(*(end for (end,) in _band([interval])), color=colour, alpha=0.1, linewidth=0)
    held = [*by_step[:1], *(interval for _, (interval,) in baselines)]
    highest = max((high for _, high in zip(*_band(held), strict=True) if isfinite(high)), default=0.0)
    if highest > 0 and min(interval.mean for interval in held) >= 0:  # a likelihood may be below
        axes.set_ylim(0, 1.05 * highest)
    axes.set_title(literal(heading, 32), fontsize=10, pad=3)
    if len(by_step) > 1:
        axes.locator_params(axis="x", integer=True)
    else:
        axes.set_xticks([0])  # without inner steps there is one place


def _band(intervals: Sequence[Interval]) -> tuple[list[float], list[float]]:
    # the interval of a single task is not known
    widths = [each.half_width if isfinite(each.half_width) else 0.0 for each in intervals]
    ends = list(zip(intervals, widths, strict=True))
    return [each.mean - width for each, width in ends], [each.mean + width for each, width in ends]
