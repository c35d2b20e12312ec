"""What a user is told, once for all ranks."""

from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn


def say(line: str) -> None:
    """Print a line that is known for metalit's among the output of others."""
    show(f"metalit: {line}")


@rank_zero_only
def show(line: str) -> None:
    """Print a line as it is: where something was written, what was found."""
    print(line, flush=True)


def warn(line: str) -> None:
    """Warn of what goes on, but may not be what the user means."""
    rank_zero_warn(line, stacklevel=5)  # the caller's line of code
