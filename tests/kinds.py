"""Few-shot tasks of classes that have names, whose examples are normal clouds: rows of two columns, or images."""

import pytest
import torch

from metalit.data import Columns, Episodes, Scaling, TaskDistribution
from metalit.errors import InputError
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.keys import fold, normal
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import FewShot

NAMES = ["Greek/alpha", "Greek/beta", "Latin/a", "Latin/b", "dog", "an old letter that nobody can name any more"]


def refused(call, *said):
    """Run what must be refused, in one line that says this; returns the line."""
    with pytest.raises(InputError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line
    assert all(part in line for part in said), line
    return line


class Kinds(TaskDistribution):
    """Tasks of three of the six classes, drawn anew for each task; a class is its centre, and its examples lie about.

    Args:
        shape: of a row of x.
        spread: of the examples of a class.
        names: of the classes.
    """

    columns = Columns("task", ["a", "b"], ["kind"])

    def __init__(self, *shape, spread=1.0, names=NAMES):
        self.shape, self.spread, self.names = shape or (2,), spread, names

    def check(self, split, size):
        pass

    def input_shape(self):
        return list(self.shape)

    def class_names(self, split):
        return self.names

    def scaling(self):
        images = len(self.shape) > 1
        columns = self.shape[0]
        # the user's units of an image are such as those of a file
        mean, std = (100.0, 50.0) if images else (0.0, 1.0)
        return Scaling([mean] * columns, [std] * columns, [], [], x_shape=self.shape if images else ())

    def centres(self):
        return normal(torch.tensor(11), len(self.names), *self.shape)

    def of_size(self, split, index, key, size):
        ways = size.ways or 3
        order = normal(fold(key, 0), len(self.names)).argsort(1)
        classes = order[:, :ways]
        return Task(
            *(self.points(classes, fold(key, draw), rows) for draw, rows in ((1, size.shots), (2, size.rows))),
            fold(key, 3),
            classes,
        )

    def points(self, classes, key, rows):
        """So many examples of each class, class by class."""
        y = torch.arange(classes.shape[1]).repeat_interleave(rows).expand(len(classes), -1)
        centres = self.centres()[classes.gather(1, y)]
        return Points(centres + self.spread * normal(key, y.shape[1], *self.shape), y)

    def sample(self, split, index, key, shots, queries):
        return self.of_size(split, index, key, Episodes(len(index), shots, queries))

    def baselines(self, tasks):
        ways, support = tasks.classes.shape[1], tasks.support.x.flatten(2)
        means = support.unflatten(1, (ways, -1)).mean(2)
        return {"nearest class mean": -torch.cdist(tasks.query.x.flatten(2).double(), means.double())}


def namer(*shape, lr=0.5, eval_steps=3, outputs=3, **options):
    """A learner of such tasks, from one inner step."""
    torch.manual_seed(0)
    shape = shape or (2,)
    network = torch.nn.Sequential(
        torch.nn.Flatten(-len(shape)), MLP([torch.Size(shape).numel(), 16, outputs], activation="Tanh")
    )
    return MetaLearner(FewShot(network), SGD(lr), Unrolled(1), eval_steps=eval_steps, **options)
