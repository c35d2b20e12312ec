"""g = ∇θ f and Jᵀg, both at (θ₀, φ₀), for f = (θᵀθ)(φᵀφ); then both variables step.

Question: how does one take Jᵀg, J = ∂g/∂φ, and step θ and φ, without the first step spoiling the second product?
Answer: take both products before anything moves. The hypergradient ``JTg`` does, and ``.grad`` plays no part.
"""

import warnings

import torch
from torch import Tensor

from metalit.adapt import outer_variable
from metalit.hypergradients import FirstOrder, JTg, Unrolled
from metalit.inner import SGD
from metalit.problems import ThetaPhi

SEED = 0
ALPHA, BETA = 0.1, 0.1  # step sizes of θ and of φ


def f(theta: Tensor, phi: Tensor) -> Tensor:
    return theta.dot(theta) * phi.dot(phi)


def expected(theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """g = 2(φᵀφ)θ and Jᵀg = (4θφᵀ)ᵀg = 8(φᵀφ)(θᵀθ)φ."""
    jacobian = 4 * torch.outer(theta, phi)
    g = 2 * phi.dot(phi) * theta
    return g, jacobian.T @ g


def ours(theta: Tensor, phi: Tensor) -> None:
    """Both products by metalit, and both steps."""
    problem, inside = ThetaPhi(theta.tolist(), phi.tolist()).double(), SGD(ALPHA)
    outer = outer_variable(problem, inside)
    estimate = JTg()(problem, inside, outer, torch.tensor(0))
    product = estimate.gradient["problem"]["phi"].detach()
    g, right = expected(problem.theta, problem.phi.detach())
    print("g      actual  ", row((problem.theta - estimate.inner) / ALPHA))
    print("       expected", row(g))
    print("Jᵀg    actual  ", row(product))
    print("       expected", row(right))
    print("θ₁ = θ₀ − αg   ", row(estimate.inner))
    print("φ₁ = φ₀ − βJᵀg ", row(problem.phi.detach() - BETA * product))
    print(f"largest error of Jᵀg: {float((product - right).abs().max()):.1g}")


def stepped_first(theta: Tensor, phi: Tensor) -> None:
    """What happens to Jᵀg where θ is stepped in place before it is taken."""
    _, right = expected(theta, phi)
    print("right                       ", row(right))

    theta_0, phi_0 = theta.clone().requires_grad_(), phi.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(theta_0, phi_0), theta_0, create_graph=True)
    with torch.no_grad():
        theta_0 -= ALPHA * g  # as optimizer.step() does
    try:
        torch.autograd.grad(g, phi_0, g.detach())
    except RuntimeError as error:
        print("θ stepped by an optimiser:   ", f"RuntimeError: θ was {str(error).split(':')[0].split('has been ')[1]}")

    theta_0, phi_0 = theta.clone().requires_grad_(), phi.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(theta_0, phi_0), theta_0, create_graph=True)
    theta_0.data -= ALPHA * g.detach()  # behind autograd's back
    (wrong,) = torch.autograd.grad(g, phi_0, g.detach())
    print("θ stepped through .data:     ", row(wrong), " silently: J is of θ₁, g of θ₀")

    theta_0, phi_0 = theta.clone().requires_grad_(), phi.clone().requires_grad_()
    with warnings.catch_warnings(action="ignore"):  # of the cycle that create_graph makes between θ and its .grad
        f(theta_0, phi_0).backward(create_graph=True)
    theta_0.grad.dot(theta_0.grad.detach()).backward()
    print("two backward(), not cleared: ", row(phi_0.grad.detach()), " silently: ∂f/∂φ is in it too")


def not_the_gradient_after_the_step(theta: Tensor, phi: Tensor) -> None:
    """What one unrolled step adds to the direct term is −α(1 − 2αφᵀφ) · Jᵀg."""
    problem, inside = ThetaPhi(theta.tolist(), phi.tolist()).double(), SGD(ALPHA)
    outer = outer_variable(problem, inside)
    through, direct = (
        estimator(problem, inside, outer, torch.tensor(0)).gradient["problem"]["phi"]
        for estimator in (Unrolled(1), FirstOrder(1))
    )
    square = problem.phi.detach().square().sum()
    print("indirect term, unrolled     ", row(through - direct))
    product = expected(problem.theta, problem.phi.detach())[1]
    print("−α(1 − 2αφᵀφ) · Jᵀg         ", row(-ALPHA * (1 - 2 * ALPHA * square) * product))


def row(values: Tensor) -> str:
    return "[" + "  ".join(f"{value:.8f}" for value in values.tolist()) + "]"


def main() -> None:
    generator = torch.Generator().manual_seed(SEED)
    # rounded to float32, as a problem holds its numbers
    theta, phi = (torch.rand(n, generator=generator).double() for n in (3, 4))
    print(f"f = (θᵀθ)(φᵀφ), θ₀ and φ₀ uniform from seed {SEED}\n")
    ours(theta, phi)
    print("\nJᵀg where θ is stepped before it is taken\n")
    stepped_first(theta, phi)
    print("\nJᵀg is not the gradient of f after the step\n")
    not_the_gradient_after_the_step(theta, phi)
    print("\nmetalit fit --config configs/bilevel_quadratic.yaml goes on for 100 steps and logs both comparisons.")


if __name__ == "__main__":
    main()
