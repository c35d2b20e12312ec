"""Memory that is not there, in one line."""

import re

import torch

from metalit.runs import where_it_failed

_ASKED = re.compile(r"allocate (?P<number>[\d.]+) ?(?P<unit>bytes|[KMGTPE]iB)")
_TOLD = ("can't allocate memory", "not enough memory", "bad_alloc", "Storage size calculation overflowed")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is lacking, of the machine or of a graphics card.

    >>> lacks_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    True
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(told in str(error) for told in _TOLD)
    )


def asked_for(error: BaseException) -> str:
    """How much was asked for in vain, as far as an error says so.

    >>> asked_for(MemoryError("Unable to allocate 74.5 GiB for an array with shape (10000000000,)"))
    'there is not enough memory: 74.5 GiB more were asked for'
    >>> asked_for(RuntimeError("you tried to allocate 8000000000 bytes. Error code 12"))
    'there is not enough memory: 7.45 GiB more were asked for'
    """
    found = _ASKED.search(str(error))
    if not found:
        return "there is not enough memory"
    number, unit = found["number"], found["unit"]
    if unit == "bytes":
        number, unit = f"{int(number) / 2**30:.3g}", "GiB"
    return f"there is not enough memory: {number} {unit} more were asked for"


def explain(error: BaseException) -> str:
    """What was being done, and the way out."""
    doing, _ = where_it_failed(error)
    return (
        f"{asked_for(error)}{f' {doing}' if doing else ''}; take fewer tasks, shots or queries (data.train, data.val, "
        "data.test), a smaller network, or fewer tasks at once (model.tasks_per_chunk)"
    )
