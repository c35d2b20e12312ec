"""What a user is told: once for all ranks, but for what ends a process."""

import sys

from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from metalit.private_lightning import rank_of_process


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


def complain(line: str) -> None:
    """Print why this process ends to stderr, in one piece and with its rank: each may end for a reason of its own."""
    rank = rank_of_process()
    sys.stderr.write(f"metalit: {f'rank {rank}: ' if rank else ''}{line}\n")
