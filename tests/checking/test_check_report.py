"""What a check says beside faults: estimators, the inner level, memory, precision, kinks; and how it is asked."""

import json

import pytest
import tiny
import torch
from fits import regression
from planted import Line, learner, tasks
from torch import nn

import metalit
from metalit import hypergradients
from metalit.checking.curvature import lanczos
from metalit.checking.estimators import advice, candidates
from metalit.checking.peak import peak_of
from metalit.checking.subject import subject_of
from metalit.cli.checked import run_check
from metalit.data import SplitsDataModule
from metalit.errors import InputError
from metalit.hypergradients import Direct, FirstOrder, Implicit, Truncated
from metalit.inner import SGD, Newton
from metalit.modules import BilevelLearner, SupervisedLearner
from metalit.problems import FewShot, Ridge


class OnlySingle(Line):
    def predict(self, inner, outer, x):
        if x.dtype != torch.float32:
            raise TypeError("this network takes float32 alone")
        return super().predict(inner, outer, x)


class AtAKink(Line):
    """Every row meets the corner of a ReLU."""

    def __init__(self):
        super().__init__()
        self.w.data.zero_()

    def predict(self, inner, outer, x):
        return torch.relu(x @ inner["w"]) + inner["b"]


@pytest.fixture(scope="module")
def report():
    return metalit.check(learner(hypergradient=FirstOrder(2)), tasks())


def row(report, name):
    return next(row for row in report.estimators if row.name == name)


def test_every_estimator_is_compared_with_the_exact_gradient(report):
    assert report.ok
    assert [each.name for each in report.estimators if each.configured] == ["FirstOrder"]
    assert row(report, "Unrolled").error == 0
    assert row(report, "Recomputed").cosine == pytest.approx(1, abs=1e-12)
    assert row(report, "FiniteDifference").error < 1e-3
    assert 0 < row(report, "FirstOrder").cosine < 0.9999
    assert row(report, "FirstOrder").error > 1e-3
    assert "learns through inner_loss" in row(report, "Implicit, CG").invalid
    assert all(each.seconds > 0 and each.peak > 0 for each in report.estimators if not each.invalid)
    assert report.advice


def test_every_estimator_that_there_is_is_a_candidate():
    every = {name for name in hypergradients.__all__ if hasattr(getattr(hypergradients, name), "carries")}
    subject = subject_of(learner(hypergradient=Truncated(2, 1)), tasks(), torch.float64)
    assert {type(each).__name__ for each in candidates(subject)} == every - {"Hypergradient"}


def test_it_prints_itself_in_80_columns(report):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    refused = "not valid: Implicit, CG; Implicit, Dense; F2SA; JTg: learns through inner_loss"
    for part in ("FirstOrder *", "advice: ", refused, "nothing is wrong", "free"):
        assert part in " ".join(text.split())


def test_it_is_one_json_object(report):
    found = json.loads(report.as_json())
    assert found["ok"] is True
    assert found["problems"] == []
    assert {each["name"] for each in found["estimators"]} >= {"Unrolled", "Reptile"}


def test_the_advice_names_what_is_cheaper_and_aligned():
    class Told:
        def __init__(self, name, seconds, cosine, peak=100, error=0.0):
            self.name, self.seconds, self.cosine, self.peak, self.error = name, seconds, cosine, peak, error
            self.adapts, self.invalid, self.told = True, "", []

    own = Told("Unrolled", 2.1, 1.0)
    assert advice([own, Told("FirstOrder", 1.0, 0.97)]) == "FirstOrder is 2.1 times as fast and 0.97 aligned"
    assert advice([own, Told("FirstOrder", 1.0, 0.2)]).startswith("Unrolled is a good choice")
    assert advice([own, Told("Recomputed", 4.2, 1.0, 20)]).startswith("Recomputed is as exact in 0.20 times the memory")
    assert advice([Told("FirstOrder", 1.0, 0.4), own]).startswith("Unrolled is exact and takes 2.1 times as long")
    # a gradient of length 3 at a cosine of 0.9 from one of length 1: √(9 + 1 − 2 · 3 · 0.9)
    long = advice([Told("JTg", 1.0, 0.9, error=4.6**0.5), own])
    assert long.endswith("; its gradient is 3 times as long as the exact one: choose the learning rate for it")


def test_memory_of_the_batch_is_extrapolated_from_few_tasks():
    found = metalit.check(learner(), tasks(40), count=4).memory
    whole = metalit.check(learner(), tasks(40), count=40).memory
    assert (found.tasks, found.measured, whole.measured) == (40, (2, 4), (20, 40))
    for name in ("Unrolled", "Recomputed"):
        assert found.all_at_once[name] == pytest.approx(whole.all_at_once[name], rel=0.05)
        assert found.one_by_one[name] < found.all_at_once[name]


def test_the_peak_is_what_is_alive_at_once():
    x = torch.ones(1000)  # 4000 bytes
    assert peak_of(lambda: [float((x + 1).sum()) for _ in range(5)], x.device) in range(4000, 4100)
    assert peak_of(lambda: torch.stack([x + 1, x + 2]), x.device) in range(16000, 16100)


def test_lanczos_finds_the_ends_of_a_spectrum():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix = root + root.mT
    exact = torch.linalg.eigvalsh(matrix)
    assert torch.allclose(lanczos(lambda v: matrix @ v, exact, 12), exact)
    few = lanczos(lambda v: matrix @ v, exact, 8)
    assert few[-1] <= exact[-1] + 1e-9
    assert few[-1] == pytest.approx(exact[-1].item(), rel=0.02)


def test_a_step_that_is_too_long_for_the_curvature_is_told():
    found = metalit.check(learner(optimizer=SGD(5.0)), tasks())
    assert [line for line in found.problems if "curvature" in line and "take an inner lr below" in line]
    assert not [line for line in metalit.check(learner(), tasks()).problems if "curvature" in line]


def test_whether_the_inner_problem_is_solved():
    data = SplitsDataModule(regression())
    given = Ridge(3, -1.0)
    solved = metalit.check(BilevelLearner(given, Newton(), Implicit(1)), data)
    assert solved.ok
    assert solved.metrics["solver_residual"] < 1e-6
    assert row(solved, "Implicit, CG").error < 1e-6
    (open_,) = metalit.check(BilevelLearner(given, SGD(0.1), Implicit(2)), data).problems
    assert "needs a stationary inner point" in open_


def test_a_warm_start_is_compared_with_the_solved_problem():
    given = BilevelLearner(Ridge(3, -1.0), SGD(0.1), Implicit(5), warm_start=True)
    found = metalit.check(given, SplitsDataModule(regression()))
    assert found.ok
    assert row(found, "Implicit, CG").error < 1e-3 < row(found, "Unrolled").error
    assert [line for line in found.remarks if "solved inner problem" in line]


def test_a_truncated_gradient_may_be_less_than_exact():
    assert metalit.check(learner(hypergradient=Truncated(3, 1)), tasks()).ok


def test_what_there_is_no_time_for_is_told():
    found = metalit.check(learner(), tasks(), seconds=1e-9)
    assert found.ok
    assert {parameter.status for parameter in found.parameters} == {"unknown"}
    lines = [line for line in found.remarks if line.startswith("left out for want of time: ")]
    assert f"{len(found.parameters)} parameters, each by itself" in lines[0]
    assert "Recomputed" in lines[1]


def test_without_an_inner_step_nothing_is_left_to_solve():
    found = metalit.check(learner(hypergradient=Direct()), tasks())
    assert found.ok
    assert "inner gradient left" not in str(found)


def test_single_precision_where_the_network_takes_no_other():
    found = metalit.check(learner(OnlySingle()), tasks())
    assert found.ok
    assert found.precision == "float32"
    assert [line for line in found.remarks if "for want of float64" in line]


@pytest.mark.parametrize(("steps", "verdict"), [(Direct(), "kink"), (FirstOrder(1), "jump")])
def test_at_a_kink_it_says_so_instead_of_failing(steps, verdict):
    found = metalit.check(learner(AtAKink(), hypergradient=steps), tasks())
    assert found.ok, found.problems
    assert verdict in {slope.verdict for slope in found.slopes}
    assert [line for line in found.remarks if f"at a {verdict}" in line]


def test_a_supervised_learner_is_checked_for_its_gradient_alone():
    found = metalit.check(tiny.supervised(), tiny.DATA["supervised"]())
    assert found.ok
    assert max(slope.error for slope in found.slopes) < 1e-7
    assert "plain gradient alone" in found.remarks[0]


def test_a_supervised_network_whose_backward_is_wrong():
    class Wrong(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum(1, keepdim=True) * self.weight.detach().sum()

    given = SupervisedLearner(Wrong(2, 1))
    found = metalit.check(given, [torch.randn(5, 2), torch.randn(5, 1)])
    assert [line for line in found.problems if line.startswith("network.weight")]


def test_what_cannot_be_checked():
    with pytest.raises(InputError, match="needs data"):
        metalit.check(learner())
    with pytest.raises(InputError, match="count=0"):
        metalit.check(learner(), tasks(), count=0)
    with pytest.raises(InputError, match=r"cannot take inputs|fails with"):
        metalit.check(learner(FewShot(nn.Linear(3, 1))), tasks())
    with pytest.raises(AttributeError, match="metalit"):
        metalit.nothing  # noqa: B018


def test_the_command_line_prints_json_fails_where_something_is_wrong_and_makes_no_folder(metalit, tmp_path):
    status, output = metalit("check", "configs/sine_imaml.yaml", "--json", "--model.inner_optimizer=SGD")
    assert status == 1, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert found["ok"] is False
    assert "needs a stationary inner point" in found["problems"][0]
    assert found["memory"]["tasks"] == 4
    assert list(tmp_path.iterdir()) == []


def test_its_help_is_its_own(capsys):
    assert run_check(["--json", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: metalit check ")
    assert "--json" in printed
