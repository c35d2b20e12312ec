"""The classes that a configuration may name without their module."""

from collections.abc import Iterator
from inspect import isabstract

from lightning.pytorch import LightningDataModule

from metalit.autodiff import Perturbation
from metalit.callbacks import SampleGradientNorms
from metalit.data import (
    BatchDataModule,
    ClassSource,
    MatrixDataModule,
    SplitsDataModule,
    TaskDataModule,
    TaskDistribution,
)
from metalit.hypergradients import Hypergradient
from metalit.hypergradients.weights import Annealed
from metalit.inner import Cosine, InnerOptimizer, Learned
from metalit.linsolve import LinearSolver
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.modules.base import OuterLearner
from metalit.problem import Problem
from metalit.problems import (
    BayesianHead,
    Cleaning,
    FewShot,
    Logistic,
    LowRank,
    NeuralProcess,
    Ridge,
    RidgeHead,
    ThetaPhi,
)

# the parser knows a class by its last name once its module is imported, as it is here
SHORT_NAMES = (
    *(BilevelLearner, MetaLearner, SupervisedLearner),
    *(BatchDataModule, MatrixDataModule, SplitsDataModule, TaskDataModule),
    *(BayesianHead, Cleaning, FewShot, Logistic, LowRank, NeuralProcess, Ridge, RidgeHead, ThetaPhi),
    SampleGradientNorms,
)
_FAMILIES: tuple[type, ...] = (
    *(OuterLearner, LightningDataModule, TaskDistribution, ClassSource),
    *(Problem, InnerOptimizer, Hypergradient, LinearSolver, Perturbation, Learned, Cosine, Annealed),
)


def class_names() -> set[str]:
    """The last names of all classes that are known now, those of the user's own modules included."""
    return {member.__name__ for family in _FAMILIES for member in _and_below(family) if not isabstract(member)}


def _and_below(family: type) -> Iterator[type]:
    yield family
    below: list[type] = family.__subclasses__()
    for member in below:
        yield from _and_below(member)
