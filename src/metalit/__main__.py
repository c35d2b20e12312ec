"""metalit: learning to learn on PyTorch Lightning.

usage: metalit fit      --config configs/NAME.yaml [overrides]   train; logs go to lightning_logs/NAME/version_N
       metalit check    --config configs/NAME.yaml [overrides]   is the gradient right, and which estimator is best?
       metalit validate --config configs/NAME.yaml [overrides]   errors on the validation tasks
       metalit test     --config configs/NAME.yaml [overrides]   the table of test errors, with 95 % intervals
       metalit predict  --config configs/NAME.yaml --data.predict_file points.csv
                                                                 adapt to your own points and predict

One config serves all five. Any value of it can be overridden by its path, and several --config files are merged:

       metalit fit --config configs/sine_maml.yaml --trainer.max_steps 1000 --model.inner_optimizer.lr 0.02
       metalit fit --config configs/sine_maml.yaml --print_config        show every value, and stop

Checkpoints: --ckpt_path last | best | auto | FILE. "last" and "best" mean the newest version of this experiment that
has one; fit then goes on in that version's folder; "auto" is "last" if there is one, and else a start. validate, test
and predict take the best one if none is named.

       metalit fit --config configs/sine_maml.yaml --ckpt_path last       go on where the run stopped
       metalit test --ckpt_path lightning_logs/sine_maml/version_0/checkpoints/best.ckpt    with that run's own config
       tensorboard --logdir lightning_logs                                watch

Repeated:

       metalit fit --config configs/sine_maml.yaml --seeds 5          five seeds, and the mean of their test scores
       metalit reproduce lightning_logs/sine_maml/version_0           the same run again: are its weights the same bits?

A check takes the options of fit and trains nothing. In a minute at most it compares the outer gradient with finite
differences, says how near each hypergradient is to the exact one and what it costs, what memory a step takes, and what
is wrong, by name. --json prints one JSON object; the exit status is 1 where something is wrong.

       metalit check --config configs/sine_maml.yaml

       metalit fit --help        every option of a subcommand
       --traceback               print the whole traceback of an error that nothing has foreseen
       metalit --version
"""

import errno
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from metalit.cli.disk import explain
from metalit.cli.parent import end_with_first, wake_first


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    2 for input that cannot be used, 1 for a loss that is NaN, for what the file system refuses, for want of memory and
    where another process of the run is gone, 3 for an error that nothing has foreseen, 130 for Ctrl-C, 143 where a
    signal stopped training, which is then saved. ``reproduce`` ends with 1 where the weights differ, ``check`` where
    something is wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    whole = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if args else 2
    if args[0] == "--version":
        print(f"metalit {version('metalit')}")
        return 0
    # configs may name classes of modules in the working folder, as they may under `python -m metalit`
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    end_with_first()
    # imported late: help must not wait for torch
    from metalit.errors import InputError, NonFiniteError, StoppedError

    status = 0
    try:
        status = _run(args)
    except InputError as error:
        status = _failed(f"error: {error}", 2)
    except NonFiniteError as error:
        status = _failed(f"stopped: {error}", 1)
    except StoppedError:
        status = 143
    except OSError as error:
        # a name that is too long was given; what else a disk refuses may be no fault of the user's
        status = _failed(f"error: {explain(error)}", 2 if error.errno == errno.ENAMETOOLONG else 1)
    except KeyboardInterrupt:
        status = _failed("interrupted", 130)
    except Exception as error:  # nothing has foreseen it
        if whole:
            traceback.print_exc()
        status = _unforeseen(error, args)
    if status:
        wake_first()
    return status


def _unforeseen(error: Exception, args: Sequence[str]) -> int:
    from metalit.cli.memory import explain as explain_memory
    from metalit.cli.memory import lacks_memory
    from metalit.cli.peers import explain as explain_others
    from metalit.cli.peers import lost_others
    from metalit.cli.unexpected import explain as explain_unexpected

    if lacks_memory(error):
        return _failed(f"error: {explain_memory(error)}", 1)
    if lost_others(error):
        return _failed(f"error: {explain_others(error)}", 1)
    return _failed(f"error: {explain_unexpected(error, args)}", 3)


def _run(args: Sequence[str]) -> int:
    if args[0] == "check":
        from metalit.cli.checked import run_check

        return run_check(args[1:])
    from metalit.cli.command_line import run

    if args[0] == "reproduce":
        from metalit.cli.reproduce import reproduce

        return 0 if reproduce(args[1:], run) else 1
    from metalit.cli.seeds import fit_seeds, taken_out

    seeds, args = taken_out(args)
    if seeds is None:
        run(args)
    else:
        fit_seeds(args, seeds, run)
    return 0


def _failed(line: str, status: int) -> int:
    from metalit.notices import complain

    complain(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
