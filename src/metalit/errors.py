"""The one error that users can mend: the command line prints its message alone, without a traceback."""


class InputError(ValueError):
    """Something that the user gave cannot be used; the message names the argument, its value and the way out."""


class NonFiniteError(RuntimeError):
    """Training stopped because the outer loss or its gradient became NaN or infinite."""
