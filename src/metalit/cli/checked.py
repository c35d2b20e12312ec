"""``metalit check``: a configuration is built as for ``fit``, and looked at instead of trained."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, cast

from metalit.checking import CheckReport, check
from metalit.cli.command_line import MetalitCLI, built
from metalit.errors import InputError
from metalit.modules.base import OuterLearner
from metalit.notices import show

_JSON = "--json"
_HELP = """usage: metalit check --config configs/NAME.yaml [options of fit] [--json]

Builds what fit would train, and trains nothing: compares the outer gradient with finite differences, says how near each
hypergradient is to the exact one and what it costs, what memory a step takes, and what is wrong, by name.

  --json             print one JSON object in place of the report
  --ckpt_path FILE   check there, and not at the initial weights; last and best are those of the experiment

All other options are those of metalit fit: see metalit fit --help. The exit status is 0 where nothing is wrong, 1 where
something is, and 2 for input that cannot be used."""


class CheckCLI(MetalitCLI):
    """The command line of ``fit``, which checks its learner on the tasks of the first outer step, and writes nothing.

    Attributes:
        report: what was found.
    """

    report: CheckReport | None = None

    def fit(self, **kwargs: Any) -> None:
        """Check the learner, at the checkpoint that was named, if one was."""
        learner = cast(OuterLearner, self.model)
        self.trainer.precision_plugin.convert_module(learner)
        if self.start.checkpoint:
            learner.on_load_checkpoint(self.start.kept)
            learner.load_state_dict(self.start.kept["state_dict"])
        learner.to(self.trainer.strategy.root_device)
        self.report = check(learner, self.datamodule)


def run_check(args: Sequence[str]) -> int:
    """Run it on the arguments of ``fit``, and ``--json`` for one JSON object in place of the report.

    Returns:
        The exit status: 1 where something is wrong.

    Raises:
        InputError: see :func:`metalit.cli.command_line.built`.
    """
    if {"-h", "--help"} & set(args):
        show(_HELP)
        return 0
    as_json = _JSON in args
    with redirect_stdout(sys.stderr) if as_json else nullcontext(), _own_name():
        cli = built(["fit", *(arg for arg in args if arg != _JSON)], cli=CheckCLI)
    report = cast(CheckReport, cast(CheckCLI, cli).report)
    show(report.as_json() if as_json else str(report))
    return 0 if report.ok else 1


@contextmanager
def _own_name() -> Iterator[None]:
    """Name the right subcommand where there is no config."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("metalit fit --config", "metalit check --config")) from error
