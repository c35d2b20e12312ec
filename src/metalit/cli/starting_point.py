"""Where a command begins: the folder of its experiment, the checkpoint that it takes, the folder of its run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

from metalit.checkpoints import read_checkpoint
from metalit.cli.provenance import Stage, check, check_left_over, given_keys, named_configs, run_of
from metalit.notices import say
from metalit.runs import RunFolder, experiment_folder, find_checkpoint, has_checkpoint, version_folder


class StartingPoint(NamedTuple):
    """What a command begins with.

    Attributes:
        experiment: the folder of all runs of the experiment.
        checkpoint: the file that is taken, if any is.
        kept: what that file holds; without one, that no step was taken.
        run: the folder of the run.
        resumes: whether that is the folder of the run that the checkpoint is of.
    """

    experiment: Path
    checkpoint: Path | None
    kept: dict[str, Any]
    run: RunFolder
    resumes: bool


def find_start(config: Namespace, subcommand: Stage, args: Sequence[str]) -> StartingPoint:
    """Find it, before anything is built.

    Args:
        config: of the subcommand.
        subcommand: its name.
        args: the command line, which tells what was asked for from what a file of a former run holds.

    Raises:
        InputError: no such checkpoint, or none that can be used; one of Lightning's own on SLURM that nobody has named.
    """
    configs, given = named_configs(args), given_keys(args)
    former = run_of(configs[0] if configs else None)
    name = config.experiment
    if name is None:
        name = former.parent.name if former else Path(configs[0]).stem if configs else "default"
    experiment = experiment_folder(config.trainer.default_root_dir, name)
    if former and name == former.parent.name and "trainer.default_root_dir" not in given:
        experiment = former.parent  # wherever it has been moved to
    # a run's own configuration may hold the checkpoint that it went on from
    asked = config.ckpt_path if "ckpt_path" in given or not former else None
    if asked == "auto":
        asked = "last" if has_checkpoint("last", experiment) else None
    if asked is None and subcommand != "fit":
        asked = "best"
    checkpoint = None if asked is None else find_checkpoint(asked, experiment)
    if checkpoint is None:
        check_left_over(config.trainer.default_root_dir)
    kept = read_checkpoint(checkpoint) if checkpoint else {"global_step": 0}
    version = None
    if checkpoint and (subcommand != "fit" or asked in ("last", "best")):
        version = version_folder(checkpoint, experiment)
    return StartingPoint(experiment, checkpoint, kept, RunFolder(experiment, version), version is not None)


def compare(start: StartingPoint, config: dict[str, Any], subcommand: Stage, args: Sequence[str]) -> None:
    """Say how the configuration differs from what the checkpoint was trained with.

    Args:
        start: with the checkpoint.
        config: the subcommand's configuration, as plain values.
        subcommand, args: as for :func:`find_start`.

    Raises:
        InputError: it differs in what changes the answer, and was not asked to.
    """
    sections = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    trained = {section: start.kept[key] for section, key in sections.items() if start.kept.get(key)}
    owner = f"ckpt_path={str(start.checkpoint)!r}"
    if start.checkpoint and not trained:
        say(f"{owner} keeps no configuration, so that the present one is taken at its word")
    for line in check(owner, trained, config, subcommand, args):
        say(line)
