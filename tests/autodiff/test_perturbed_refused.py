"""What has no gradient at perturbed weights is refused in one line that names the way out."""

import math

import pytest
import torch
from perturbed_networks import KEY, X, data, exact, filled, noise, on_a_copy, tied
from torch import nn

from metalit.autodiff import SAM, AdaptiveSAM, WeightNoise, gradient_at, perturbed_gradient
from metalit.errors import InputError
from metalit.networks import MLP

# errors
LAYER = nn.Linear(2, 1)


def refused(match, perturbation=None, loss=lambda network: network(X).sum(), module=LAYER, **options):
    with pytest.raises(InputError, match=match):
        perturbed_gradient(module, loss, perturbation or {}, **options)


def test_losses_that_are_no_scalar_are_refused():
    refused(r"loss: it returned shape \[4, 1\], not a scalar", loss=lambda network: network(X))
    refused("loss: it returned type float", loss=lambda network: 1.0)
    exact(gradient_at(LAYER, lambda network: network(X).sum().reshape(1, 1))[1]["bias"], torch.tensor([4.0]))


def test_the_network_that_is_given_is_the_module_itself():
    module, x = filled(MLP([3, 4, 1], activation="Tanh")), data((3,))
    alpha = noise(module)

    def by_the_module(_):
        penalty = sum(parameter.square().sum() for parameter in module.parameters())
        return module(x).square().mean() + penalty + module.out.weight.sum() + module.state_dict()["out.bias"].sum()

    def by_the_network(network):
        penalty = sum(parameter.square().sum() for _, parameter in network.named_parameters())
        return network(x).square().mean() + penalty + network.out.weight.sum() + network.out.bias.detach().sum()

    expected = on_a_copy(module, by_the_network, alpha)
    exact(perturbed_gradient(module, by_the_network, alpha)[:2], expected)
    exact(perturbed_gradient(module, by_the_module, alpha)[:2], expected)


def test_parameters_that_were_taken_from_the_module_before_are_refused():
    kept, outer = list(LAYER.parameters()), nn.Sequential(LAYER)
    features = LAYER(X)
    told = "loss: it reaches the module's 'weight' by another way"
    refused(told, loss=lambda network: network(X).sum() + kept[0].square().sum())
    refused(told, SAM(), loss=lambda network: network(X).sum() + kept[0].square().sum())
    refused(told, loss=lambda network: (network(X) * features).sum())
    found = gradient_at(LAYER, lambda network: (network(X) * features.detach()).sum() + kept[0].detach().sum())
    exact(found[1]["bias"], features.detach().sum().reshape(1))
    # a module that holds it is it
    exact(gradient_at(LAYER, lambda _: outer(X).sum())[1]["bias"], torch.tensor([4.0]))


def test_a_loss_without_the_network_is_refused():
    refused("does not depend on the network it is given", loss=lambda network: torch.tensor(1.0))
    with pytest.raises(InputError, match="no trainable parameter"):
        gradient_at(nn.Linear(2, 1).requires_grad_(False), lambda network: network(X).sum())


def test_perturbations_that_do_not_fit_are_refused():
    refused("perturbation: 'wieght' is no parameter of Linear", {"wieght": X})
    refused(r"perturbation: 'weight' has shape \[2\], but needs \[1, 2\]", {"weight": X[0]})
    refused("perturbation: 'bias' has shape 0.1", {"bias": 0.1})
    refused("perturbation: 1 tensors for 2 parameters", [torch.zeros(1, 2)])
    refused("perturbation: a Tensor is neither", torch.zeros(1, 2).sum() + 1)
    refused("perturbation: a float is neither", 0.1)
    refused("are one tied weight", {"0.weight": torch.ones(3, 3), "2.weight": torch.ones(3, 3)}, module=tied())
    with pytest.raises(InputError, match=r"parameters: 'bias' has shape \[2\]"):
        gradient_at(LAYER, lambda network: network(X).sum(), {"bias": torch.zeros(2)})


def test_known_gradients_that_do_not_fit_are_refused():
    refused(r"gradient: \['bias'\] missing", SAM(), gradient={"weight": torch.ones(1, 2)})
    refused(r"gradient: 'bias' has shape \[2\]", SAM(), gradient={"weight": None, "bias": torch.ones(2)})
    refused("gradient: 'w' is no parameter", SAM(), gradient={"weight": None, "bias": None, "w": torch.ones(2)})


def test_noise_without_a_key_or_of_no_parameter_is_refused():
    refused("key: None, but WeightNoise", WeightNoise(0.1))
    refused("names: the pattern 'head.*'.*matches no trainable parameter", WeightNoise(0.1, names=("head.*",)), key=KEY)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("make", "argument"),
    [(WeightNoise, "scale"), (SAM, "rho"), (AdaptiveSAM, "rho"), (AdaptiveSAM, "eta")],
)
def test_sizes_that_are_negative_or_not_finite_are_refused(make, argument, bad):
    with pytest.raises(InputError, match=f"{make.__name__}: {argument}={bad} must be a finite number, 0 or more"):
        make(**{argument: bad})
