"""The command line: LightningCLI with the folders, the checkpoints and the messages that its users expect."""

import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from metalit.callbacks import BestCheckpoint, FitFigures, LastCheckpoint
from metalit.callbacks.record import RunRecord, SaveConfig
from metalit.callbacks.signals import set_handlers
from metalit.checks.ranks import check_nodes
from metalit.checks.resuming import restoring_is_told
from metalit.cli.arguments import check_values, file_without_settings, origin, prepared
from metalit.cli.factories import check_factories
from metalit.cli.messages import explain, failed_constructor
from metalit.cli.peers import ending_together
from metalit.cli.provenance import Stage, named_configs, on_purpose, with_own_config
from metalit.cli.seeds import set_seeds
from metalit.cli.short_names import class_names
from metalit.cli.starting_point import compare, find_start
from metalit.cli.trainer_parts import trainer_arguments, wants
from metalit.cli.training_run import train
from metalit.cli.widths import fill_widths
from metalit.errors import InputError
from metalit.modules import MetaLearner
from metalit.modules.base import OuterLearner
from metalit.notices import say, show
from metalit.private_lightning import fill_config_dump, parser_of, subcommand_parsers


class MetalitCLI(LightningCLI):
    """``metalit fit | validate | test | predict``: a configuration is parsed, built and run.

    Runs lie in ``lightning_logs/<experiment>/version_N/``. The configuration alone decides what is built: unlike
    LightningCLI's, a checkpoint's hyperparameters never override it.
    """

    def __init__(self, args: Sequence[str], seed: int | None = None) -> None:
        self._seed = seed
        self._args = with_own_config(args)
        if len(self._args) > len(args):
            say(f"with the configuration of the run, {named_configs(self._args)[0]}")
        args = self._args
        # with subcommands, ${…} must hold below the subcommand's own root
        # and no value may name os, subprocess, pickle and the like: an empty list makes jsonargparse enforce its own
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True, import_path_denylist=[])
        own = {"exit_on_error": False}
        super().__init__(
            model_class=OuterLearner,
            subclass_mode_model=True,
            trainer_class=Trainer,
            parser_kwargs={"parser_mode": "omegaconf+", **own, **{name: dict(own) for name in self.subcommands()}},
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            args=list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without options that are fixed here: checkpoints are loaded safely, and tables are our own."""
        own = {"weights_only", "verbose", "return_predictions"}
        return {name: skipped | own for name, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the experiment, and the callbacks that every run has."""
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="The folder of the runs in lightning_logs/; the name of the first config file if not given.",
        )
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="The CPU threads of torch. Small networks run fastest, and undisturbed by other programs, with 1.",
        )
        parser.add_lightning_class_args(FitFigures, "figures")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.set_defaults(
            {
                "trainer.devices": 1,  # more are asked for: a step must be worth what they cost
                "trainer.enable_model_summary": False,
                "trainer.log_every_n_steps": 50,
                "trainer.max_epochs": -1,  # max_steps alone decides when training ends
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, or explain in one line why not.

        Raises:
            InputError: an unknown key, a value of the wrong type, no such class or file.
        """
        given = cast(Sequence[str], args)
        try:
            super().parse_arguments(parser, prepared(given))
        except OmegaConfBaseException as cause:
            raise InputError(f"config: {str(cause).splitlines()[0]}") from None
        except ArgumentError as cause:
            known = {key for sub in subcommand_parsers(self).values() for key in sub.get_defaults().keys()}  # noqa: SIM118
            explanation = explain(str(cause), known, class_names())
            if file := file_without_settings(explanation.key, given):
                raise InputError(
                    f"{explanation.key}={file}: this file holds no settings; name a class, or a YAML file of settings"
                ) from None
            raise InputError(f"{explanation}{origin(explanation.key, given) if explanation.key else ''}") from None
        config = self.config[self.config.subcommand]
        check_values(config)
        if self._seed is not None:
            set_seeds(config, self._seed)

    @property
    def stage(self) -> Stage:
        """The subcommand."""
        return cast(Stage, self.subcommand)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: see the class."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, before anything is built."""
        config = self.config[self.subcommand]
        for part in ("model", "data"):
            check_factories(config.as_dict().get(part), part)
        if self.subcommand == "fit" and config.trainer.max_steps == 0:
            raise InputError("trainer.max_steps=0: nothing would be trained; give the number of outer steps")
        if config.trainer.fast_dev_run and "fused_steps" in config.model.init_args:
            # so many steps are tried, in less time than a compiler takes
            config.model.init_args.update(Namespace(fused_steps=1, compile=False))
        fill_widths(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.start = find_start(config, self.stage, self._args)
        fill_config_dump(self)
        compare(self.start, self.config_dump, self.stage, self._args)
        config.ckpt_path = None if self.start.checkpoint is None else str(self.start.checkpoint)

    def instantiate_classes(self) -> None:
        """Build everything; an input error comes out as it was raised, not wrapped by the parser.

        Raises:
            InputError: from any constructor.
        """
        try:
            super().instantiate_classes()
        except (InputError, MisconfigurationException):
            raise
        except Exception as error:  # whatever the constructor of a named class may raise
            raise failed_constructor(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with our logger and callbacks, unless the configuration names others."""
        config = self.config_init[self.subcommand].trainer
        name = "config.yaml" if self.subcommand == "fit" else f"config_{self.subcommand}.yaml"
        self.save_config_kwargs["config_filename"] = name
        kwargs |= trainer_arguments(config, self.start.run, RunRecord(self._args, self.config_dump))
        keys = parser_of(self, self.stage).callback_keys
        keys[:] = [key for key in keys if wants(key, config)]
        if config.barebones:
            self.save_config_callback = None
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            owner = f"trainer.devices={config.devices}" if "devices" in str(error) else "trainer"
            raise InputError(f"{owner}: {' '.join(str(error).split())}") from error
        check_nodes(trainer)
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train, and say where everything is.

        Raises:
            InputError: several seeds in several processes.
        """
        if self._seed is not None and self.trainer.world_size > 1:
            raise InputError(
                f"seeds: {self.trainer.world_size} processes would start each run; use one with "
                "--trainer.devices=1, or run the seeds one by one with --seed_everything and --data.seed"
            )
        train(self.trainer, self.start, **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the validation tasks; the table is the report's."""
        show(f"validating {self.start.checkpoint}")
        with ending_together(self.trainer), self.start.run.opened(self.trainer, trains=False):
            self.trainer.validate(**kwargs, weights_only=True, verbose=False)

    def test(self, **kwargs: Any) -> None:
        """Evaluate on the test tasks; the table is the report's."""
        show(f"testing {self.start.checkpoint}")
        with ending_together(self.trainer), self.start.run.opened(self.trainer, trains=False):
            self.trainer.test(**kwargs, weights_only=True, verbose=False)

    def predict(self, **kwargs: Any) -> None:
        """Predict at the user's points.

        Raises:
            InputError: the learner does not adapt to points.
        """
        if not isinstance(self.model, MetaLearner):
            raise InputError(
                f"predict adapts a MetaLearner to the points of data.predict_file, and a {type(self.model).__name__} "
                "does not adapt; use test, or its checkpoint from Python"
            )
        if on_purpose("model.eval_steps", self._args):
            self.model.asked_steps = self.model.eval_steps
        show(f"predicting with {self.start.checkpoint}")
        with ending_together(self.trainer), self.start.run.opened(self.trainer, trains=False):
            self.trainer.predict(**kwargs, return_predictions=False, weights_only=True)


def run(args: Sequence[str], seed: int | None = None) -> Path | None:
    """Run the command line with settings that suit a terminal; returns the folder of the run, if it has one.

    Args:
        args: the arguments.
        seed: takes the place of every seed in the configuration.
    """
    return built(args, seed).start.run.folder


def built(args: Sequence[str], seed: int | None = None, cli: type[MetalitCLI] | None = None) -> MetalitCLI:
    """The same; returns what was built and has run.

    Args:
        args, seed: as of :func:`run`.
        cli: what runs them, if not :class:`MetalitCLI` itself.

    Raises:
        InputError: something that the user gave cannot be used.
        NonFiniteError: training became NaN or infinite.
        StoppedError: a signal stopped it.
    """
    for chatty in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.showwarning = _show
        # a run that is continued writes into its own folder, and its stream of tasks goes on at the trainer's step
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
        warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging")
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        if "fit" not in args:  # a test needs no Timer of the fit's
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
        # Lightning's own calls, none of the user's doing
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            with restoring_is_told():
                return (cli or MetalitCLI)(args, seed)
        except InputError:
            raise
        except MisconfigurationException as error:
            raise InputError(str(error)) from error
        except ValueError as error:
            if "val_check_interval" not in str(error):
                raise
            raise InputError(f"trainer.val_check_interval: {error}") from error
        finally:
            set_handlers(handlers)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning of ours without the line of code that gave it, which the user has no use for."""
    ours = Path(filename).is_relative_to(Path(__file__).parent.parent)
    text = f"metalit: warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno)
    sys.stderr.write(text)
