"""The first outer step that was not finite is the one that is told, however late it is looked for."""

import torch

from metalit.training.finite import FiniteWatch


def test_the_first_step_is_kept_where_later_ones_are_not_finite_either():
    watch = FiniteWatch(torch.device("cpu"))
    for last_step in (4, 8):
        watch.add(torch.tensor([0.0, 1.0, 0.0, 1.0]))
        watch.look(last_step)
    assert watch.step == 2
