"""``python struck.py SIGNAL RANK PLACE fit …``: the command line, of which one rank sends itself a signal somewhere.

Lightning starts the other ranks with the same command.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from metalit.__main__ import main
from metalit.callbacks import StopOnSignal
from metalit.runs import RunFolder

# what is called on all ranks, and in "a write" on the first one alone
PLACES: dict[str, tuple[Any, str]] = {
    "before they meet": (torch.distributed, "init_process_group"),
    "in a step": (StopOnSignal, "on_train_batch_end"),
    "in a save": (RunFolder, "on_save_checkpoint"),
    "in a write": (torch, "save"),
}


def _struck(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    def first(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return first


if __name__ == "__main__":
    name, rank, place, *args = sys.argv[1:]
    if os.environ.get("LOCAL_RANK", "0") == rank:
        holder, attribute = PLACES[place]
        setattr(holder, attribute, _struck(getattr(holder, attribute), signal.Signals[name]))
    sys.exit(main(args))
