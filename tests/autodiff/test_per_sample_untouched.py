"""Derivatives for each row leave the module as it was, and can be differentiated further."""

import pytest
import torch
from cases import draw
from held import everything_of, same
from per_sample_functions import KEY, filled
from torch import nn
from torch.func import grad
from torch.testing import assert_close

from metalit.autodiff import per_sample_gradients, per_sample_hessian, per_sample_jacobian
from metalit.errors import InputError
from metalit.networks import MLP


# left as it was
class Everything(nn.Module):
    """Tied, frozen and unused parameters, a buffer, dropout and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("position", torch.arange(3.0))
        self.recurrent = nn.GRU(3, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.dropout.eval()

    def forward(self, x):
        hidden = self.dropout(self.second(self.first(x + self.position)))
        return self.recurrent(hidden.unsqueeze(1))[0][:, 0]


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_exactly_as_it_was(fails):
    module, x = filled(Everything()), draw(4, 3)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, gradients = everything_of(module), [parameter.grad for parameter in module.parameters()]
    if fails:
        with pytest.raises(InputError, match="per_sample_jacobian"):
            per_sample_gradients(module, x)
    else:
        per_sample_gradients(module, x, x[:, 0], loss=lambda out, y: out.sum() - y, key=KEY)
        per_sample_jacobian(module, x, chunk_size=3)
        per_sample_jacobian(module, x, by=0)
        per_sample_hessian(module, x)
    same(before, everything_of(module))
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert bool((gradient == 7).all())


def test_the_notebooks_order_of_events():
    model, x = nn.Linear(1, 1), draw(10, 1).float()
    a, b = model._parameters["weight"], model._parameters["bias"]
    model(x[:1]).sum().backward()
    a.grad.zero_(), b.grad.zero_()

    def partial_model(a, b):
        model._parameters["weight"], model._parameters["bias"] = a, b
        return model(x)

    torch.autograd.functional.jacobian(partial_model, (a, b))
    assert model._parameters["weight"] is not a
    found = per_sample_jacobian(model, x, flat=True)
    assert_close(found.squeeze(1), torch.hstack([x, torch.ones(10, 1)]), rtol=0, atol=0)
    assert a.grad.item() == b.grad.item() == 0
    assert model._parameters["weight"].grad is None


# what is differentiated once more
def test_own_parameters_are_constants():
    found = per_sample_gradients(MLP([2, 3, 1]), torch.ones(4, 2), flat=True)
    assert not found.requires_grad
    found = per_sample_gradients(MLP([2, 3, 1]), torch.ones(4, 2), names="out.*", parameters=None, flat=True)
    assert not found.requires_grad


def test_a_gradient_penalty_reaches_the_given_parameters():
    module, x = filled(MLP([2, 4, 1], activation="Tanh")), draw(5, 2)
    given = dict(module.named_parameters())
    penalty = (per_sample_gradients(module, x, by=0, parameters=given).norm(dim=1) - 1).square().mean()
    penalty.backward()
    found = {name: parameter.grad for name, parameter in given.items()}

    def by_hand(given):
        weight, out = given["hidden1.weight"], given["out.weight"][0]
        slope = (1 - torch.tanh(x @ weight.T + given["hidden1.bias"]).square()) * out
        return ((slope @ weight).norm(dim=1) - 1).square().mean()

    expected = grad(by_hand)({name: value.detach() for name, value in given.items()})
    found["out.bias"] = torch.zeros(1).double() if found["out.bias"] is None else found["out.bias"]
    assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_works_where_gradients_are_off():
    module, x = filled(MLP([2, 4, 1], activation="Tanh")), draw(5, 2)
    expected = per_sample_gradients(module, x, flat=True)
    with torch.no_grad():
        assert_close(per_sample_gradients(module, x, flat=True), expected, rtol=0, atol=0)
        assert_close(per_sample_hessian(module, x), per_sample_hessian(module, x), rtol=0, atol=0)
