"""LightningModules: what trains a hypergradient under the Trainer. One file for each."""

from metalit.modules.adapted import Adapted
from metalit.modules.meta import MetaLearner

__all__ = ["Adapted", "MetaLearner"]
