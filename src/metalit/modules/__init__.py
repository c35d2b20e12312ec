"""LightningModules: what trains a hypergradient, or a network, under the Trainer. One file for each."""

from metalit.modules.adapted import Adapted
from metalit.modules.bilevel import BilevelLearner
from metalit.modules.meta import MetaLearner
from metalit.modules.supervised import SupervisedLearner

__all__ = ["Adapted", "BilevelLearner", "MetaLearner", "SupervisedLearner"]
