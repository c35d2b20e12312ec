"""A learner adapts to examples of the user's classes, and gives the probability of each by its name."""

import re

import numpy as np
import pytest
import torch
from fits import bare
from kinds import Kinds, namer, refused
from tiny import meta
from torch import nn

from metalit.data import Episodes, Scaling, TaskDataModule
from metalit.judging import probabilities

SHAPE = (1, 4, 4)
NAMES = ["dog", "cat", "dog", "owl", "cat"]


def learner(*shape, scaling=True, **options):
    module = namer(*(shape or SHAPE), **options)
    module.scaling = Kinds(*(shape or SHAPE)).scaling() if scaling else None
    return module


def pictures(rows=5, shape=SHAPE):
    return torch.randint(0, 256, (rows, *shape), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)


def by_hand(module, x, numbers, asked, steps, lr=0.5, ways=3):
    """The probabilities after steps of gradient descent on the mean cross-entropy, in a loop of torch's autograd."""
    network = module.problem.network
    copies = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    normalise = lambda x: ((x.double() - 100.0) / 50.0).to(next(iter(copies.values())).dtype)  # noqa: E731
    for _ in range(steps):
        outputs = torch.func.functional_call(network, copies, (normalise(x),))
        loss = -outputs.log_softmax(1)[range(len(x)), numbers].mean()
        gradients = torch.autograd.grad(loss, list(copies.values()))
        copies = {
            name: (value - lr * gradient).detach().requires_grad_()
            for (name, value), gradient in zip(copies.items(), gradients, strict=True)
        }
    outputs = torch.func.functional_call(network, copies, (normalise(asked),))[:, :ways]
    return (outputs.exp() / outputs.exp().sum(1, keepdim=True)).detach()


@pytest.mark.parametrize("outputs", [3, 5])
def test_probabilities_are_those_of_a_plain_loop(outputs):
    module, asked = learner(outputs=outputs).double(), pictures(4)
    found = module.adapt(pictures(), NAMES, steps=2)(asked)
    expected = by_hand(module, pictures(), [1, 0, 1, 2, 0], asked, 2)
    assert list(found) == ["cat", "dog", "owl"]
    torch.testing.assert_close(found.table, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["dog"], expected[:, 1], rtol=1e-12, atol=1e-12)
    assert found.best() == [list(found)[place] for place in expected.argmax(1)]
    assert found.are_probabilities


@pytest.mark.parametrize(
    ("y", "names"),
    [
        ((7, -1, 7, 12, -1), [-1, 7, 12]),
        (np.array([7, -1, 7, 12, -1]), [-1, 7, 12]),
        (torch.tensor([7, -1, 7, 12, -1]), [-1, 7, 12]),
        (np.array(NAMES), ["cat", "dog", "owl"]),
        (np.array(NAMES, dtype=object), ["cat", "dog", "owl"]),
    ],
    ids=["tuple", "array", "tensor", "names", "objects"],
)
def test_classes_may_be_whole_numbers_or_names_of_any_kind(y, names):
    module = learner()
    found = module.adapt(pictures(), y)(pictures(2).numpy())
    assert list(found) == names
    as_names = module.adapt(pictures(), ["b" if name == names[1] else "a" if name == names[0] else "c" for name in y])
    torch.testing.assert_close(found.table, as_names(pictures(2)).table)


def test_pixels_may_be_of_any_type_of_number():
    module, x = learner(), pictures().numpy()
    said = module.adapt(x, NAMES)(x).table
    for dtype in ("uint16", ">f4", "int64"):
        adapted = module.adapt(x.astype(dtype), NAMES)
        assert torch.equal(adapted(x.astype(dtype)).table, said)
        assert adapted.loss(x.astype(dtype), NAMES) == adapted.loss(torch.as_tensor(x), NAMES)
    refused(
        lambda: adapted.loss(x, ["ox"] * 5), "loss: y holds 'ox', which is none of the classes ['cat', 'dog', 'owl']"
    )
    refused(lambda: adapted.loss(x[:, :, 1:], NAMES), "loss: x has shape (5, 1, 3, 4)")


def test_rows_of_numbers_have_classes_too():
    module = learner(2)
    found = module.adapt(torch.randn(4, 2), ["a", "b", "b", "a"])(torch.randn(6, 2))
    assert found["a"].shape == (6,)
    torch.testing.assert_close(found.table.sum(1), torch.ones(6))


def test_it_takes_as_many_steps_as_validation_found_best(tmp_path):
    module = namer(*SHAPE)
    bare(tmp_path, 2).fit(module, TaskDataModule(Kinds(*SHAPE), *[Episodes(2, 2, 2)] * 3))
    adapted = module.adapt(pictures(), NAMES)
    assert adapted.steps == module.best_steps
    assert adapted.inner.keys() == dict(module.problem.network.named_parameters()).keys()


@pytest.mark.parametrize(
    ("loss", "outputs", "expected"),
    [
        (None, [[0.0, np.log(3.0)]], [[0.25, 0.75]]),
        (nn.CrossEntropyLoss(reduction="none"), [[0.0, np.log(3.0)]], [[0.25, 0.75]]),
        (nn.NLLLoss(reduction="none"), [[np.log(0.25), np.log(0.75)]], [[0.25, 0.75]]),
        (nn.NLLLoss(reduction="none"), [[np.log(0.1), np.log(0.3)]], [[0.25, 0.75]]),
        (nn.BCEWithLogitsLoss(reduction="none"), [[np.log(3.0)]], [[0.25, 0.75]]),
    ],
    ids=["none", "cross-entropy", "log-probabilities", "some of them", "logits"],
)
def test_probabilities_of_criteria(loss, outputs, expected):
    found = probabilities(loss, torch.tensor(outputs, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_of_another_criterion_the_outputs_are_given():
    module = learner()
    module.problem.loss = nn.MultiMarginLoss(reduction="none")
    found = module.adapt(pictures(), NAMES, steps=0)(pictures(2))
    assert not found.are_probabilities
    torch.testing.assert_close(found.table, module.problem.network((pictures(2) - 100.0) / 50.0))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((3, 4, 4), "convert the colours"),
        ((4, 4, 1), "x.permute(0, 3, 1, 2)"),
        ((4, 4), "x.unsqueeze(1)"),
        ((1, 8, 8), "resize the images"),
        ((16,), "(5, 16)"),
    ],
)
def test_other_shapes_are_refused_with_what_the_network_takes(shape, said):
    module = learner()
    adapted = module.adapt(pictures(), NAMES)
    for call in (lambda: module.adapt(pictures(5, shape), NAMES), lambda: adapted(pictures(5, shape))):
        refused(call, "the network takes images [rows, 1, 4, 4]", said)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (pictures(4), NAMES, "x has 4 points and y has 5"),
        (pictures(0), [], "class(es), []"),
        (pictures(2), ["a", "a"], "1 class(es), ['a']; give examples of two at least"),
        (pictures(), list("abcda"), "4 classes, and what is learned has outputs for 3; give examples of at most 3"),
        (pictures(), ["a", None, "b", "c", "a"], "y holds None beside names"),
        (pictures().float() / 0.0, NAMES, "not finite"),
        (NAMES, NAMES, "x is of type list; give a tensor of numbers"),
        (np.array(NAMES), NAMES, "x is an array of <U3; give a tensor of numbers"),
        (pictures(), ["a", 3, 3, "a", 3], "y holds 3 beside names"),
        (pictures().numpy(), [0.0, 1.0, 2.0, 0.0, 1.0], "y is [5] of float64; give the class of each row, [rows]"),
        (pictures(), torch.tensor([[0], [1], [2], [0], [1]]), "y is [5, 1] of int64; give the class of each row"),
    ],
    ids=[
        *("lengths", "nothing", "one class", "too many", "a missing name", "not finite", "no tensor", "texts"),
        *("names and numbers", "real numbers", "a column"),
    ],
)
def test_what_cannot_be_adapted_to_is_told_in_one_line(x, y, said):
    refused(lambda: learner().adapt(x, y), said)


def test_more_classes_than_outputs_name_the_ways_out():
    told = refused(lambda: learner().adapt(pictures(), list("abcda")))
    assert re.search(r"data\.train\.ways=4.*Prototypes", told)


def test_a_learner_of_real_numbers_refuses_classes():
    module = meta()
    module.scaling = Scaling([0.0], [1.0], [2.0], [3.0])
    refused(lambda: module.adapt(torch.randn(2, 1), ["a", "b"]), "predicts real numbers")


def test_images_in_other_units_are_told(recwarn):
    module = learner()
    module.adapt(pictures(), NAMES)
    assert not list(recwarn)
    module.adapt(pictures() / 255, NAMES)
    assert "x spans 0 to 0.99" in str(recwarn.pop().message)
