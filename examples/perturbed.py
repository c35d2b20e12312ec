"""How does one get ∇_w L(w + α) of a ready-made network, without writing α into its forward pass?

∂(w + α)/∂w is the identity, so it is the plain gradient, taken at w + α: ``metalit.autodiff.perturbed_gradient``
evaluates the network there and leaves it as it was. Beware of ``[4, 1] − [4]``, which broadcasts to ``[4, 4]``.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metalit.autodiff import PerturbedGradient, perturbed_gradient

SEED = 1


class Setup(NamedTuple):
    """Four samples, the weights of the two layers, and α for the weights alone."""

    x: Tensor
    y: Tensor
    weights: dict[str, Tensor]
    alpha: dict[str, Tensor]


def setup(seed: int = SEED) -> Setup:
    """A linear network 6 → 4 → 1 by the names that ``nn.Sequential`` gives, all from one seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y = draw(4, 6), draw(4)
    weights = {"0.weight": draw(4, 6), "0.bias": draw(4), "1.weight": draw(1, 4), "1.bias": draw(1)}
    return Setup(x, y, weights, {"0.weight": 0.1 * draw(4, 6), "1.weight": 0.1 * draw(1, 4)})


def broadcast_loss(out: Tensor, y: Tensor) -> Tensor:
    """The loss of the notebook: ``[4, 1] − [4]`` is every prediction minus every target."""
    return (out - y).abs().sum()


def rowwise_loss(out: Tensor, y: Tensor) -> Tensor:
    """Every prediction minus its own target."""
    return (out.squeeze(1) - y).abs().sum()


def naive(given: Setup) -> dict[str, Tensor]:
    """The gradient by w, with α written into the forward pass by hand."""
    w = {name: value.clone().requires_grad_() for name, value in given.weights.items()}
    hidden = F.linear(given.x, w["0.weight"] + given.alpha["0.weight"], w["0.bias"])
    out = F.linear(hidden, w["1.weight"] + given.alpha["1.weight"], w["1.bias"])
    return dict(zip(w, torch.autograd.grad(broadcast_loss(out, given.y), list(w.values())), strict=True))


def at_moved_weights(given: Setup) -> dict[str, Tensor]:
    """The gradient by new variables that hold w + α."""
    moved = {name: value + given.alpha.get(name, 0.0) for name, value in given.weights.items()}
    moved = {name: value.requires_grad_() for name, value in moved.items()}
    out = F.linear(F.linear(given.x, moved["0.weight"], moved["0.bias"]), moved["1.weight"], moved["1.bias"])
    return dict(zip(moved, torch.autograd.grad(broadcast_loss(out, given.y), list(moved.values())), strict=True))


def ready_made(given: Setup) -> nn.Module:
    """The network as ``torch.nn`` makes it; it knows nothing of α."""
    network = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)).double()
    network.load_state_dict(given.weights)
    return network


def outputs(given: Setup) -> Tensor:
    """The predictions at w + α."""
    moved = {name: value + given.alpha.get(name, 0.0) for name, value in given.weights.items()}
    return torch.func.functional_call(ready_made(given), moved, given.x)


def compare(given: Setup, found: PerturbedGradient) -> None:
    """Print the three gradients side by side."""
    by_hand, moved = naive(given), at_moved_weights(given)
    print(f"{'norm of the gradient by':<26}{'α by hand':>20}{'at w + α':>20}{'perturbed_gradient':>20}   equal")
    for name, slope in found.gradient.items():
        equal = torch.equal(by_hand[name], slope) and torch.equal(moved[name], slope)
        norms = "".join(f"{value[name].norm():>20.14g}" for value in (by_hand, moved, found.gradient))
        print(f"{name:<26}{norms}   {equal}")


def main() -> None:
    """Print the gradient three ways, its norm two ways, and what the broadcast does."""
    given = setup()
    network = ready_made(given)
    found = perturbed_gradient(network, lambda call: broadcast_loss(call(given.x), given.y), given.alpha)

    print(f"∇_w L(w + α), L = Σ|out − y|, 6 → 4 → 1, four samples, α on the weights alone, seed {SEED}\n")
    compare(given, found)
    untouched = all(torch.equal(value, given.weights[name]) for name, value in network.state_dict().items())
    empty = all(parameter.grad is None for parameter in network.parameters())
    print(f"\nthe network is as it was: {untouched}; every .grad is None: {empty}")

    slopes = found.gradient.values()
    print(f"norm of the norms        : {torch.stack([slope.norm() for slope in slopes]).norm():.14g}")
    print(f"norm of the concatenation: {torch.cat([slope.flatten() for slope in slopes]).norm():.14g}")

    print("\nThe predictions are [4, 1] and the targets [4]: their difference is [4, 4], in silence.")
    right = perturbed_gradient(network, lambda call: rowwise_loss(call(given.x), given.y), given.alpha)
    difference = outputs(given) - given.y
    print(f"{'':<22}{'pairs':>8}{'L(w + α)':>14}{'Σ of the signs':>17}{'∂L/∂b₂':>10}")
    for label, result, signs in (
        ("[4, 1] − [4]", found, difference.sign()),
        ("[4] − [4]", right, difference.diagonal().sign()),
    ):
        bias = result.gradient["1.bias"].item()
        print(f"{label:<22}{signs.numel():>8}{result.loss:>14.6f}{signs.sum():>17g}{bias:>10g}")
    print("∂L/∂b₂ is the sum of the signs of all differences: 16 of them instead of 4, here a factor of 4 too much.")
    print("metalit's own losses refuse predictions and targets of unequal shapes.")


if __name__ == "__main__":
    main()
