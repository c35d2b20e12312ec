"""What happens around training: checkpoints, pictures, progress, tables."""

from metalit.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from metalit.callbacks.ending import Ending
from metalit.callbacks.figures import FitFigures
from metalit.callbacks.predictions import PredictionWriter
from metalit.callbacks.progress import Progress
from metalit.callbacks.report import ReportWriter
from metalit.callbacks.sample_gradients import SampleGradientNorms
from metalit.callbacks.signals import StopOnSignal
from metalit.callbacks.signs import SignsOfLife

__all__ = [
    "BestCheckpoint",
    "Ending",
    "FitFigures",
    "LastCheckpoint",
    "PredictionWriter",
    "Progress",
    "ReportWriter",
    "SampleGradientNorms",
    "SignsOfLife",
    "StopOnSignal",
]
