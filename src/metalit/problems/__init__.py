"""Problems: what is learned at both levels. One file for each."""

from metalit.problems.bayesian_head import BayesianHead
from metalit.problems.cleaning import Cleaning
from metalit.problems.few_shot import FewShot
from metalit.problems.low_rank import LowRank
from metalit.problems.matching import Matching
from metalit.problems.neural_process import NeuralProcess
from metalit.problems.penalised import Logistic, Ridge
from metalit.problems.proto_maml import ProtoMAML
from metalit.problems.prototypes import Prototypes
from metalit.problems.ridge_head import RidgeHead
from metalit.problems.rows import RowsProblem
from metalit.problems.theta_phi import ThetaPhi

__all__ = [
    "BayesianHead",
    "Cleaning",
    "FewShot",
    "Logistic",
    "LowRank",
    "Matching",
    "NeuralProcess",
    "ProtoMAML",
    "Prototypes",
    "Ridge",
    "RidgeHead",
    "RowsProblem",
    "ThetaPhi",
]
