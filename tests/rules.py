"""Each inner optimiser by hand: a step in forward mode, on numbers that carry their derivative by (φ, rates).

The derivative of each operation is written out here; nothing is differentiated by autograd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve

from metalit.inner import ALFA, SGD, Adam, AdamW, Learned, MetaCurvature, MetaSGD, Newton, RMSprop
from metalit.tree import leaves, unflatten


class Dual:
    """A tensor ``[...]`` and its derivative ``[..., m]`` with respect to the outer variable."""

    def __init__(self, value: Tensor, by_outer: Tensor) -> None:
        self.value, self.by_outer = value, by_outer

    def __add__(self, other: Any) -> "Dual":
        value, by_outer = _parts(other)
        return Dual(self.value + value, self.by_outer + by_outer)

    def __mul__(self, other: Any) -> "Dual":
        value, by_outer = _parts(other)
        return Dual(self.value * value, self.by_outer * _wide(value) + self.value[..., None] * by_outer)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Dual":
        return -1 * self

    def __sub__(self, other: Any) -> "Dual":
        return self + -1 * other

    def __rsub__(self, other: Any) -> "Dual":
        return other + -self

    def __truediv__(self, other: Any) -> "Dual":
        return self * (other.of(lambda x: 1 / x, lambda x: -1 / x**2) if isinstance(other, Dual) else 1 / other)

    def __rtruediv__(self, other: Any) -> "Dual":
        return other * self.of(lambda x: 1 / x, lambda x: -1 / x**2)

    def __pow__(self, power: int) -> "Dual":
        return self.of(lambda x: x**power, lambda x: power * x ** (power - 1))

    def __matmul__(self, other: "Dual") -> "Dual":
        by_left = torch.einsum("ijm,j...->i...m", self.by_outer, other.value)
        by_right = torch.einsum("ij,j...m->i...m", self.value, other.by_outer)
        return Dual(torch.einsum("ij,j...->i...", self.value, other.value), by_left + by_right)

    def __getitem__(self, index: Any) -> "Dual":
        return Dual(self.value[index], self.by_outer[index])

    def of(self, fn: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> "Dual":
        """A function, entry by entry, whose derivative is ``slope``."""
        return Dual(fn(self.value), slope(self.value)[..., None] * self.by_outer)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Dual":
        """A linear function of the entries."""
        return Dual(fn(self.value), torch.stack([fn(part) for part in self.by_outer.unbind(-1)], -1))

    def root(self) -> "Dual":
        """√x, and at 0 what |g| = √g² gives a step g / (|g| + eps): no derivative."""
        return self.of(Tensor.sqrt, lambda x: torch.where(x > 0, 0.5 / x.sqrt(), 0.0))

    @property
    def T(self) -> "Dual":
        return Dual(self.value.T, self.by_outer.transpose(0, 1))

    @property
    def flat(self) -> "Dual":
        return Dual(self.value.flatten(), self.by_outer.flatten(0, -2))

    def constant(self) -> "Dual":
        return Dual(self.value, 0 * self.by_outer)


def _parts(other: Any) -> tuple[Any, Any]:
    return (other.value, other.by_outer) if isinstance(other, Dual) else (other, 0.0)


def _wide(value: Any) -> Any:
    return value[..., None] if isinstance(value, Tensor) else value


def cat(parts: list[Dual]) -> Dual:
    return Dual(torch.cat([part.value for part in parts]), torch.cat([part.by_outer for part in parts]))


class Layout:
    """Where the entries of θ and of what is learned lie in the flat vectors.

    Args:
        inner: a template of θ.
        learned: the optimiser's part of the outer variable.
        phi: the number of entries of the problem's part, which comes first.
    """

    def __init__(self, inner: Any, learned: Any, phi: int) -> None:
        shapes = {name: leaf.shape for name, leaf in leaves(inner)}
        self.names, self.shapes = list(shapes), list(shapes.values())
        self.rates = torch.cat([leaf.flatten() for _, leaf in leaves(learned)] or [torch.zeros(0, dtype=torch.float64)])
        self.phi = phi
        places = torch.arange(len(self.rates), dtype=torch.float64)
        self.places = {n: p.long() for n, p in leaves(unflatten(places, learned))} if len(places) else {}

    def learned(self, name: str) -> Dual:
        """What is learned under this dotted name."""
        return self.at(self.places[name])

    def at(self, places: Tensor) -> Dual:
        columns = torch.eye(self.phi + len(self.rates), dtype=torch.float64)
        return Dual(self.rates[places], columns[self.phi + places])

    def number(self, name: str, given: float | Learned, step: int) -> float | Dual:
        """A hyperparameter of each entry of θ."""
        if not isinstance(given, Learned):
            return given
        found = []
        for leaf, shape in zip(self.names, self.shapes, strict=True):
            places = self.places.get(f"{name}.{leaf}", self.places.get(name))
            if "step" in given.per:
                places = places[min(step, len(places) - 1)]
            found.append(places.flatten() if given.per == "entry" else places.expand(shape.numel()))
        raw = self.at(torch.cat(found) if found else torch.zeros(0, dtype=torch.long))
        if name == "lr":
            return raw.of(Tensor.exp, Tensor.exp) if given.positive else raw
        if name in ("momentum", "alpha", "beta1", "beta2"):
            share = 1 / (1 + (-raw.value).exp())
            return raw.of(lambda _: share, lambda _: share * (1 - share))
        return raw.of(Tensor.exp, Tensor.exp)

    def split(self, vector: Dual) -> list[Dual]:
        """One matrix or vector for each parameter."""
        sizes = [shape.numel() for shape in self.shapes]
        values, by_outer = vector.value.split(sizes), vector.by_outer.split(sizes)
        return [Dual(v.view(s), d.view(*s, -1)) for v, d, s in zip(values, by_outer, self.shapes, strict=True)]


# ---- a step from θ, given how to ask for the gradient; at.state is carried along

Slope = Callable[[Dual], Dual]


def _numbers(at: Any, step: int) -> dict[str, Any]:
    optimizer, layout = at.optimizer, at.layout
    given = {name: getattr(optimizer, name) for name in type(optimizer).domains}
    if isinstance(optimizer, MetaSGD):
        given["lr"] = Learned(optimizer.lr, "entry")
    found = {name: layout.number(name, number, step) for name, number in given.items()}
    if optimizer.schedule is not None:
        found["lr"] = found["lr"] * optimizer.schedule[min(step, len(optimizer.schedule) - 1)]
    return found


def _clipped(at: Any, g: Dual, step: int) -> Dual:
    if at.optimizer.clip_norm is None:
        return g
    most = at.layout.number("clip_norm", at.optimizer.clip_norm, step)
    most = most[0] if isinstance(most, Dual) else most
    norm = (g * g).map(lambda part: part.sum(0, keepdim=True)).root()
    return g * (most / norm) if norm.value > (most.value if isinstance(most, Dual) else most) else g


def _state(at: Any, name: str, like: Dual) -> Dual:
    return at.state.get(name, 0 * like)


def _sgd(at: Any, theta: Dual, slope: Slope, step: int, seen: Callable[[Dual], Dual] = lambda g: g) -> Dual:
    n = _numbers(at, step)
    velocity = _state(at, "velocity", theta)
    where = theta - n["lr"] * (n["momentum"] * velocity) if at.optimizer.nesterov else theta
    g = seen(_clipped(at, slope(where), step))
    velocity = at.state["velocity"] = n["momentum"] * velocity + (g + n["weight_decay"] * where)
    return theta - n["lr"] * velocity


def _meta_curvature(at: Any, theta: Dual, slope: Slope, step: int) -> Dual:
    def of_one(name: str, part: Dual) -> Dual:
        places = (f"curvature.{name}.{axis}".replace("..", ".") for axis in range(part.value.dim()))
        first, *second = (at.layout.learned(place) for place in places)
        curved = first @ part
        return (second[0] @ curved.T).T.flat if second else curved  # M_o G M_iᵀ

    def curved(g: Dual) -> Dual:
        return cat([of_one(*each) for each in zip(at.layout.names, at.layout.split(g), strict=True)])

    return _sgd(at, theta, slope, step, curved)


def _alfa(at: Any, theta: Dual, slope: Slope, step: int) -> Dual:
    n, layout = _numbers(at, step), at.layout
    g = _clipped(at, slope(theta), step)
    means = [part.map(lambda v: v.mean().reshape(1)) for vector in (theta, g) for part in layout.split(vector)]
    parts = ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    W1, c1, W2, c2 = (layout.learned(f"network.{part}") for part in parts)
    hidden = W1 @ cat(means) + c1
    found = W2 @ hidden.of(Tensor.relu, lambda x: (x > 0).to(x)) + c2
    each = torch.cat([torch.full((shape.numel(),), number) for number, shape in enumerate(layout.shapes)])
    a, b = found[each], found[len(layout.shapes) + each]
    return theta - n["lr"] * (a * g + n["weight_decay"] * (b * theta))


def _adam(at: Any, theta: Dual, slope: Slope, step: int) -> Dual:
    n, decoupled = _numbers(at, step), isinstance(at.optimizer, AdamW)
    g = _clipped(at, slope(theta), step)
    if not decoupled:
        g = g + n["weight_decay"] * theta
    m = at.state["m"] = n["beta1"] * _state(at, "m", g) + (1 - n["beta1"]) * g
    v = at.state["v"] = n["beta2"] * _state(at, "v", g) + (1 - n["beta2"]) * (g * g)
    taken = at.taken + 1
    m_hat, v_hat = m / (1 - n["beta1"] ** taken), v / (1 - n["beta2"] ** taken)
    kept = theta - n["lr"] * (n["weight_decay"] * theta) if decoupled else theta
    return kept - n["lr"] * (m_hat / (v_hat.root() + n["eps"]))


def _rmsprop(at: Any, theta: Dual, slope: Slope, step: int) -> Dual:
    n = _numbers(at, step)
    g = _clipped(at, slope(theta), step) + n["weight_decay"] * theta
    v = at.state["v"] = n["alpha"] * _state(at, "v", g) + (1 - n["alpha"]) * (g * g)
    u = at.state["u"] = n["momentum"] * _state(at, "u", g) + g / (v.root() + n["eps"])
    return theta - n["lr"] * u


def _newton(at: Any, theta: Dual, slope: Slope, step: int) -> Dual:
    given, g = (theta.value, at.phi, step), slope(theta)
    K = at.hand.H(*given) + at.optimizer.damping * torch.eye(len(g.value), dtype=torch.float64)
    move = solve(K, g.value)
    by_theta, by_phi = at.hand.twist(*given, move)
    return theta - Dual(move, solve(K, g.by_outer - by_theta @ theta.by_outer - at.padded(by_phi)))


RULES = {
    SGD: _sgd,
    MetaSGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
    MetaCurvature: _meta_curvature,
    ALFA: _alfa,
    Newton: _newton,
}
