"""Task distributions and the DataModule that draws from them."""

from metalit.data.base import Split, TaskDistribution
from metalit.data.curves import Curves
from metalit.data.module import Episodes, TaskDataModule
from metalit.data.scaling import Scaling
from metalit.data.sine import Sine
from metalit.data.table import Columns

__all__ = ["Columns", "Curves", "Episodes", "Scaling", "Sine", "Split", "TaskDataModule", "TaskDistribution"]
