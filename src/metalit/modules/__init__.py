"""LightningModules: what trains a hypergradient under the Trainer. One file for each."""

from metalit.modules.meta import Adapted, MetaLearner

__all__ = ["Adapted", "MetaLearner"]
