"""Messages of one line for what ``vmap`` cannot do, each with the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

from metalit.errors import InputError

OTHER_DRAWS = (
    "fn: it draws random numbers by other means than the modules torch.nn.Dropout, Dropout1d, Dropout2d and Dropout3d "
    "with key=, so its draws would not follow the row; use those, or call .eval()"
)
_IN_PLACE = (
    "fn: it changes a tensor in place by what it sees in a row (Embedding(max_norm=...) does), which cannot be "
    "vectorised over rows; assign a new tensor instead, or leave the change out"
)
_REFUSED = {
    "randomness error mode": OTHER_DRAWS,
    "rrelu_with_noise": OTHER_DRAWS,
    "data-dependent control flow": (
        "fn: it decides by the value of a tensor (if, while, .item()), which cannot be vectorised over rows; use "
        "torch.where"
    ),
    "support dynamic shape": (
        "fn: a shape depends on values (x[mask], nonzero), which cannot be vectorised over rows; use torch.where"
    ),
    "setup_context": (
        "fn: a backward hook, or an autograd.Function without setup_context, cannot be vectorised over rows; leave it "
        "out, or write setup_context"
    ),
    "mutate a captured Tensor": _IN_PLACE,
    "there exists a Tensor `other`": _IN_PLACE,
    "doesn't match the broadcast shape": _IN_PLACE,
}


@contextmanager
def refusals() -> Iterator[None]:
    """Raise what ``vmap`` cannot do as an :class:`InputError` of one line."""
    try:
        yield
    except RuntimeError as error:
        for part, explanation in _REFUSED.items():
            if part in str(error):
                raise InputError(explanation) from error
        raise
