"""The picture of an episode: the support images of each class, and what its query images are taken for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from metalit.callbacks.tiles import Row, Tile, draw_rows
from metalit.judging import chosen
from metalit.modules.meta import MetaLearner
from metalit.problem import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLASSES, _SUPPORT, _IMAGES = 5, 3, 8  # at most: classes, support images of each, images of each


def draw_episode(learner: MetaLearner, tasks: Task, names: Sequence[str]) -> "Figure | None":
    """Draw the first of some tasks, after as many inner steps as a prediction takes.

    Args:
        learner: what is drawn.
        tasks: a batch of tasks of classes, in normalised units.
        names: of the classes.

    Returns:
        The figure; None where x are no images, or it is not known how a prediction answers.
    """
    if tasks.classes is None or tasks.query.x.dim() != 5:
        return None
    steps = min(learner.prediction_steps, learner.eval_steps)
    support, query, classes = tasks.support, tasks.query, tasks.classes[0].cpu()
    prediction = learner.query_predictions(tasks)[0, steps, :, : len(classes)].cpu()
    true = query.y[0].cpu()
    answers = chosen(getattr(learner.problem, "loss", None), prediction, true)
    if answers is None:
        return None
    called = [names[number] for number in classes.tolist()]
    shown = [
        (learner.scaling.restore_x(points.x[0].cpu()) if learner.scaling else points.x[0].cpu()).numpy()
        for points in (support, query)
    ]
    rows = []
    for label, name in enumerate(called[:_CLASSES]):
        own = (support.y[0].cpu() == label).nonzero().flatten().tolist()[:_SUPPORT]
        asked = (true == label).nonzero().flatten().tolist()[: _IMAGES - len(own)]
        taken = [(place, int(answers[place])) for place in asked]
        rows.append(
            Row(
                name,
                [Tile(shown[0][place]) for place in own],
                [
                    Tile(shown[1][place], "" if answer == label else last_part(called[answer], called), answer != label)
                    for place, answer in taken
                ],
            )
        )
    right, part = int((answers == true).sum()), f"; {len(rows)} of {len(called)} classes are shown"
    after = f"after {steps} inner step{'s' if steps > 1 else ''}: " if steps else ""
    title = f"{after}{right} of {len(true)} queries right{part if len(rows) < len(called) else ''}"
    return draw_rows(rows, title, ("support", "query (✗ taken for)"))


def last_part(name: str, names: Sequence[str]) -> str:
    """A name without the groups that it is of, unless another ends like it.

    >>> last_part("Greek/alpha", ["Greek/alpha", "Latin/a"]), last_part("Greek/a", ["Greek/a", "Latin/a"])
    ('alpha', 'Greek/a')
    """
    ends = [other.rpartition("/")[2] for other in names]
    end = name.rpartition("/")[2]
    return end if ends.count(end) == 1 else name
