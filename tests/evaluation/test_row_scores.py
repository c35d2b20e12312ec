"""Loss and accuracy count every real row once: neither padding, nor rows that the criterion ignores, nor rows twice."""

from functools import partial

import pytest
import torch
from fits import bare, parameters
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from metalit.autodiff import SAM
from metalit.errors import InputError
from metalit.evaluation.row_scores import RowScores
from metalit.judging import real_rows, right_rows
from metalit.losses import row_losses
from metalit.modules import SupervisedLearner
from metalit.problem import Points, collate_points

SGD = partial(torch.optim.SGD, lr=0.1)


def loader(*tensors, size=5, masked=None):
    class Numbered(Dataset):
        def __len__(self):
            return len(tensors[0])

        def __getitem__(self, row):
            parts = [tensor[row] for tensor in tensors]
            return tuple(parts) if masked is None else Points(*parts, masked[row])

    return DataLoader(Numbered(), batch_size=size)


def scored(tmp_path, network, data, loss=None):
    module = SupervisedLearner(network, loss)
    bare(tmp_path).validate(module, data, verbose=False)
    return module.scores["learned"]


def table(classes=3, rows=13, columns=4):
    torch.manual_seed(0)
    return torch.randn(rows, columns), torch.randint(0, classes, (rows,))


# ---- padding


@pytest.mark.parametrize("bad", [1e3, torch.nan])
def test_padding_counts_in_no_score(bad, tmp_path):
    x, y = table()
    network, real = nn.Linear(4, 3), torch.arange(13) % 3 != 1
    spoiled = torch.where(real[:, None], x, torch.tensor(bad))
    found = scored(tmp_path, network, loader(spoiled, y, masked=real))
    with torch.no_grad():
        scores = network(x[real])
    assert found["loss"] == pytest.approx(float(F.cross_entropy(scores, y[real])), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((scores.argmax(1) == y[real]).double().mean()))


@pytest.mark.parametrize("perturbation", [None, SAM(0.1)])
@pytest.mark.parametrize("chunk", [None, 2])
def test_padding_trains_nothing(perturbation, chunk, tmp_path):
    x, y = torch.randn(10, 4), torch.randn(10, 2)
    real = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    ends = []
    alone = DataLoader([(x[:3], y[:3]), (x[[5, 9]], y[[5, 9]])], batch_size=None)
    for data in (loader(torch.where(real[:, None], x, 7.0), y, masked=real), alone):
        torch.manual_seed(0)
        module = SupervisedLearner(nn.Linear(4, 2), perturbation=perturbation, rows_per_chunk=chunk, optimizer=SGD)
        bare(tmp_path, 2).fit(module, data)
        ends.append(parameters(module))
    torch.testing.assert_close(*ends)


def test_a_batch_of_padding_alone_moves_nothing(tmp_path):
    module = SupervisedLearner(nn.Linear(4, 2), optimizer=SGD)
    before = parameters(module)
    bare(tmp_path, 1).fit(module, loader(torch.ones(4, 4), torch.ones(4, 2), masked=torch.zeros(4, dtype=torch.bool)))
    torch.testing.assert_close(parameters(module), before, rtol=0, atol=0)


def test_padding_with_batch_norm_is_refused(tmp_path):
    network = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    data = loader(torch.ones(4, 4), torch.ones(4, 2), masked=torch.ones(4, dtype=torch.bool))
    with pytest.raises(InputError, match=r"model\.network: BatchNorm would mix the padding"):
        bare(tmp_path, 1).fit(SupervisedLearner(network), data)
    scored(tmp_path, network, data)


# ---- classes that the criterion ignores


@pytest.mark.parametrize(("loss", "index"), [(None, -100), (nn.CrossEntropyLoss(ignore_index=2, reduction="none"), 2)])
def test_ignored_rows_count_nowhere(loss, index, tmp_path):
    x, y = table()
    y[::3] = index
    network, kept = nn.Linear(4, 3), y != index
    with torch.no_grad():
        scores = network(x)
    expected = F.cross_entropy(scores, y, ignore_index=index)
    found = scored(tmp_path, network, loader(x, y), loss)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((scores.argmax(1) == y)[kept].double().mean()))
    slope = torch.autograd.grad(F.cross_entropy(network(x), y, ignore_index=index), list(network.parameters()))
    before = parameters(module := SupervisedLearner(network, loss, optimizer=SGD))
    bare(tmp_path, 1).fit(module, loader(x, y, size=13))
    for (name, now), part in zip(parameters(module).items(), slope, strict=True):
        torch.testing.assert_close(now, before[name] - 0.1 * part)


def test_ignored_places_of_a_picture_count_nowhere(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(3, 1, 2, 4), torch.randint(0, 2, (3, 2, 4))
    y[:, 0] = 255
    y[2] = 255
    network = nn.Conv2d(1, 2, 1)
    found = scored(tmp_path, network, loader(x, y), nn.CrossEntropyLoss(ignore_index=255, reduction="none"))
    with torch.no_grad():
        scores = network(x)
    # as many places count in each row that does
    assert found["loss"] == pytest.approx(float(F.cross_entropy(scores, y, ignore_index=255)), rel=1e-6)
    right = (scores.argmax(1) == y)[y != 255].double().mean()
    assert found["accuracy"] == pytest.approx(float(right))


# ---- what is an answer


class Binary(nn.BCEWithLogitsLoss):
    def forward(self, prediction, target):
        return super().forward(prediction.flatten(), target.flatten().float())


class Unknown(nn.Module):
    def forward(self, prediction, target):
        return (prediction.flatten(1).mean(1) - target.flatten()).square()


@pytest.mark.parametrize("shape", [(13,), (13, 1)])
def test_one_column_answers_what_the_criterion_finds_the_smaller_loss_for(shape, tmp_path):
    x, y = table(2)
    network = nn.Linear(4, 1)
    right = float(((network(x)[:, 0] > 0).long() == y).double().mean())
    assert 0 < right < 1
    data = loader(x, y.reshape(shape))
    assert scored(tmp_path, network, data, Binary(reduction="none"))["accuracy"] == pytest.approx(right)
    assert right_rows(Unknown(), torch.tensor([[0.4], [0.6]]), torch.ones(2).long()).tolist() == [0, 1]  # the nearer
    probability = torch.sigmoid(network(x).detach())
    assert float(right_rows(nn.BCELoss(reduction="none"), probability, y).mean()) == pytest.approx(right)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ((4, 3), torch.ones(4, 3)),  # soft or several labels
        ((4, 3), torch.ones(4, 3, dtype=torch.int64)),  # counts, or labels padded by -1
        ((4, 2), torch.tensor([0, 1, 5, 1])),  # two numbers that describe a count
        ((4, 1), torch.tensor([0, 1, 0, 1])),  # one column under a criterion that takes classes
        ((4, 3, 5), torch.zeros(4, 3, dtype=torch.int64)),
        ((), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_what_is_no_answer_has_no_accuracy(prediction, target):
    assert right_rows(None, torch.zeros(prediction), target) is None


def test_classes_in_a_column_are_classes():
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert right_rows(Unknown(), scores, torch.tensor([[0], [1], [0]])).tolist() == [1, 1, 0]
    assert right_rows(nn.NLLLoss(), scores, torch.tensor([True, True, False])).tolist() == [0, 1, 0]


def test_which_rows_are_real():
    mask, target = torch.tensor([True, True, False]), torch.tensor([1, -100, 2])
    assert real_rows(None, target, mask).tolist() == [True, False, False]
    assert real_rows(Unknown(), target, None) is None
    assert real_rows(None, target.float(), mask) is mask
    assert row_losses(None, torch.zeros(3, 3, 2), torch.tensor([[-100, 0], [1, 2], [-100, -100]]))[2] == 0


def test_rows_count_once_over_batches_and_ranks():
    torch.manual_seed(0)
    losses, right = torch.randn(11, dtype=torch.float64), torch.randint(0, 2, (11,)).double()
    ranks = [RowScores(), RowScores()]
    for rank, parts in zip(ranks, ([[0, 1, 2], [3]], [[4, 5, 6, 7, 8, 9, 10]]), strict=True):
        for part in parts:
            rank.update(losses[part], right[part], None)
    for state in ranks[0]._reductions:  # as torchmetrics adds up what it gathers
        setattr(ranks[0], state, ranks[0]._reductions[state](torch.stack([getattr(rank, state) for rank in ranks])))
    torch.testing.assert_close(ranks[0].compute(), torch.stack([losses.mean(), right.mean()]), rtol=1e-14, atol=0)
    ranks[1].update(losses, None, None)
    assert ranks[1].compute().isnan().tolist() == [False, True]


def test_single_rows_are_collated_with_their_masks():
    found = collate_points([Points(torch.ones(2), torch.tensor(1), mask) for mask in (torch.tensor(False), None)])
    assert found.x.shape == (2, 2)
    assert found.y.tolist() == [1, 1]
    assert found.mask.tolist() == [False, True]
    rows = [Points(torch.ones(n, 2), torch.ones(n, 1), None) for n in (3, 1)]
    assert collate_points(rows).mask.tolist() == [[True] * 3, [True, False, False]]
