"""LightningModules: what trains a hypergradient, or a network, under the Trainer. One file for each."""

import warnings

from metalit.modules.adapted import Adapted
from metalit.modules.adapted_classes import AdaptedClasses, ClassScores
from metalit.modules.bilevel import BilevelLearner
from metalit.modules.meta import MetaLearner
from metalit.modules.supervised import SupervisedLearner

# a call of Lightning's own, none of the user's doing
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", append=True)

__all__ = ["Adapted", "AdaptedClasses", "BilevelLearner", "ClassScores", "MetaLearner", "SupervisedLearner"]
