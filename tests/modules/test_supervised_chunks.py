"""Chunks of a batch of rows give what the whole batch gives."""

from itertools import combinations

import pytest
import torch
from fits import bare, parameters, scalars, trainer
from lightning.pytorch.callbacks import LambdaCallback
from supervised_learners import OPTIMIZERS, TIGHT, classes, mlp
from torch import nn

from metalit.autodiff import SAM, WeightNoise, gradient_at
from metalit.errors import InputError
from metalit.modules import SupervisedLearner


@pytest.mark.parametrize("perturbation", [None, WeightNoise(0.1), SAM(0.2)])
@pytest.mark.parametrize("rows", [1, 6, 16])
def test_chunks_of_rows_are_the_whole_batch(tmp_path, perturbation, rows):
    ends = []
    for chunk in (None, rows):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
        module = SupervisedLearner(network, None, perturbation, rows_per_chunk=chunk, optimizer=OPTIMIZERS["SGD"])
        trainer(tmp_path / str(chunk), 5, precision="64-true").fit(module, classes())
        ends.append((parameters(module), scalars(tmp_path / str(chunk))))
    (whole, told), (parts, logged) = ends
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, **TIGHT)
    assert logged.keys() == told.keys()
    for tag, values in told.items():
        assert [value for _, value in logged[tag]] == pytest.approx([value for _, value in values], rel=1e-6)


def test_chunks_of_no_rows_are_refused():
    with pytest.raises(InputError, match=r"model\.rows_per_chunk=0 must be at least 1"):
        SupervisedLearner(mlp(), rows_per_chunk=0)


class Tokens(nn.Module):
    """Drops from ``[rows · 3, 4]``, ``[rows, 3, 4]`` or ``[3, rows, 4]``, or whole channels of ``[rows, 3, 4]``."""

    def __init__(self, form):
        super().__init__()
        self.before, self.after, self.form = nn.Linear(4, 12), nn.Linear(12, 3), form
        self.dropout = nn.Dropout1d(0.5) if form == "channels" else nn.Dropout(0.5)

    def forward(self, x):
        hidden = self.before(x).reshape(-1, 3, 4)
        if self.form == "flat":
            hidden = self.dropout(hidden.flatten(0, 1)).reshape(-1, 3, 4)
        elif self.form == "tokens first":
            hidden = self.dropout(hidden.transpose(0, 1)).transpose(0, 1)
        else:
            hidden = self.dropout(hidden)
        return self.after(hidden.flatten(1))


@pytest.mark.parametrize("form", ["flat", "rows first", "channels", "tokens first"])
def test_each_row_drops_what_it_would_drop_in_the_whole_batch(tmp_path, form):
    ends = []
    for chunk in (None, 5):
        torch.manual_seed(0)
        module = SupervisedLearner(Tokens(form), rows_per_chunk=chunk, optimizer=OPTIMIZERS["SGD"])
        bare(tmp_path, 2, precision="64-true").fit(module, classes())
        ends.append(torch.cat([value.flatten() for value in parameters(module).values()]))
    assert torch.allclose(*ends, rtol=1e-12, atol=1e-13) == (form != "tokens first")


def test_parts_of_a_batch_drop_apart_where_rows_do_not_come_first():
    def dropped(first, rows):
        network, key, masks = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)), torch.tensor(3), []
        gradient_at(network, lambda net: masks.append(net(torch.ones(7, rows, 1))) or masks[0].sum(), key=key,
                    rows=range(first, first + rows))  # fmt: skip
        return (masks[0] == 0).detach()

    whole, parts = dropped(0, 300), [dropped(first, 100) for first in (0, 100, 200)]
    assert not torch.equal(torch.cat(parts, 1), whole)
    for one, other in combinations(parts, 2):
        assert 0.4 < float((one == other).float().mean()) < 0.6
        # nor is one a shifted copy of the other
        assert not torch.equal(one.flatten()[100:], other.flatten()[:-100])


def test_batches_are_cut_into_chunks_that_batchnorm_can_take(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    bare(tmp_path, 2).fit(SupervisedLearner(network, rows_per_chunk=5), classes())
    assert int(network[1].num_batches_tracked) == 2 * 4  # 16 rows


class Full(nn.Module):
    """Does not take more than 8 rows, as long as it counts."""

    def __init__(self):
        super().__init__()
        self.counts = False

    def forward(self, x):
        if self.counts and self.training and len(x) > 8:
            raise torch.OutOfMemoryError
        return x


def test_buffers_are_those_of_one_pass_where_memory_ends_in_another(tmp_path):
    ends = []
    for full in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Full(), nn.Linear(8, 3))
        module = SupervisedLearner(network, rows_per_chunk=None if full else 8, optimizer=OPTIMIZERS["SGD"])
        begin = LambdaCallback(
            on_train_start=lambda *_, network=network, full=full: setattr(network[2], "counts", full)
        )
        bare(tmp_path, 2, callbacks=[begin]).fit(module, classes())
        assert module.rows_per_chunk == 8
        ends.append(dict(network.named_buffers()) | parameters(module))
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name
