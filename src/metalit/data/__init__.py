"""Tasks, tables and matrices, on which problems are posed, and the DataModules that draw from them."""

from metalit.data.base import Episodes, Split, TaskDistribution
from metalit.data.batches import BatchDataModule
from metalit.data.classes.arrays import Arrays
from metalit.data.classes.base import Classes, ClassSource
from metalit.data.classes.glyphs import Glyphs
from metalit.data.classes.image_folder import ImageFolder
from metalit.data.classes.images import read_image
from metalit.data.classes.tasks import ClassTasks
from metalit.data.curves import Curves
from metalit.data.matrix import MatrixDataModule
from metalit.data.module import TaskDataModule
from metalit.data.rows import CsvRows, Rows, RowSource, SklearnTable
from metalit.data.scaling import Scaling
from metalit.data.sine import Sine
from metalit.data.splits import SplitsDataModule
from metalit.data.table import Columns

__all__ = [
    "Arrays",
    "BatchDataModule",
    "ClassSource",
    "ClassTasks",
    "Classes",
    "Columns",
    "CsvRows",
    "Curves",
    "Episodes",
    "Glyphs",
    "ImageFolder",
    "MatrixDataModule",
    "RowSource",
    "Rows",
    "Scaling",
    "Sine",
    "SklearnTable",
    "Split",
    "SplitsDataModule",
    "TaskDataModule",
    "TaskDistribution",
    "read_image",
]
