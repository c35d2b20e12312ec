"""The command line: LightningCLI with the folders, the checkpoints and the messages that its users expect."""

import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from metalit.arguments import check_values, origin, prepared
from metalit.autodiff import Perturbation
from metalit.callbacks import (
    BestCheckpoint,
    Ending,
    FitFigures,
    LastCheckpoint,
    PredictionWriter,
    Progress,
    ReportWriter,
    SampleGradientNorms,
    SignsOfLife,
    StopOnSignal,
)
from metalit.callbacks.signals import ignore_signals, requeue, set_handlers
from metalit.checkpoints import read_checkpoint
from metalit.checks.ranks import check_nodes
from metalit.data import (
    BatchDataModule,
    MatrixDataModule,
    RowSource,
    SplitsDataModule,
    TaskDataModule,
    TaskDistribution,
)
from metalit.errors import InputError, StoppedError
from metalit.factories import check_factories
from metalit.hypergradients import Hypergradient
from metalit.inner import InnerOptimizer
from metalit.linsolve import LinearSolver
from metalit.messages import explain, failed_constructor
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.modules.base import OuterLearner
from metalit.notices import say, show
from metalit.parent import mark_first
from metalit.private_lightning import cluster_environment, fill_config_dump, parser_of, subcommand_parsers
from metalit.problem import Problem
from metalit.problems import Cleaning, FewShot, Logistic, LowRank, Ridge, ThetaPhi
from metalit.provenance import check, check_left_over, given_keys, named_configs, on_purpose, run_of, with_own_config
from metalit.runs import (
    RunFolder,
    RunLogger,
    SaveConfig,
    experiment_folder,
    find_checkpoint,
    has_checkpoint,
    version_folder,
)
from metalit.widths import fill_widths

# importing them is what lets configs name them by their short names
SHORT_NAMES = (
    *(BilevelLearner, MetaLearner, SupervisedLearner),
    *(BatchDataModule, MatrixDataModule, SplitsDataModule, TaskDataModule),
    *(Cleaning, FewShot, Logistic, LowRank, Ridge, ThetaPhi),
    SampleGradientNorms,
)
_FAMILIES = (
    *(OuterLearner, LightningDataModule, TaskDistribution, RowSource),
    *(Problem, InnerOptimizer, Hypergradient, LinearSolver, Perturbation),
)

_Kind = TypeVar("_Kind", bound=Callback)


class MetalitCLI(LightningCLI):
    """``metalit fit | validate | test | predict``: a configuration is parsed, built and run.

    Runs lie in ``lightning_logs/<experiment>/version_N/``. The configuration alone decides what is built: unlike
    LightningCLI's, a checkpoint's hyperparameters never override it.
    """

    def __init__(self, args: Sequence[str]) -> None:
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
        """Lightning's, less what is not the user's to choose here: loading is safe, and tables are our own."""
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
        try:
            super().parse_arguments(parser, prepared(args))
        except OmegaConfBaseException as cause:
            raise InputError(f"config: {str(cause).splitlines()[0]}") from None
        except ArgumentError as cause:
            known = {key for sub in subcommand_parsers(self).values() for key in sub.get_defaults().keys()}  # noqa: SIM118
            told = explain(str(cause), known, _class_names())
            raise InputError(f"{told}{origin(told.key, args) if told.key else ''}") from None
        check_values(self.config[self.config.subcommand])

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
        configs, given = named_configs(self._args), given_keys(self._args)
        run = run_of(configs[0] if configs else None)
        name = config.experiment
        if name is None:
            name = run.parent.name if run else Path(configs[0]).stem if configs else "default"
        self.experiment = experiment_folder(config.trainer.default_root_dir, name)
        if run and name == run.parent.name and "trainer.default_root_dir" not in given:
            self.experiment = run.parent  # wherever it has been moved to
        # a run's own configuration may hold the checkpoint that it went on from
        asked = config.ckpt_path if "ckpt_path" in given or not run else None
        if asked == "auto":
            asked = "last" if has_checkpoint("last", self.experiment) else None
        if asked is None and self.subcommand != "fit":
            asked = "best"
        self.checkpoint = None if asked is None else find_checkpoint(asked, self.experiment)
        if self.checkpoint is None:
            check_left_over(config.trainer.default_root_dir)
        kept = read_checkpoint(self.checkpoint) if self.checkpoint else {"global_step": 0}
        self.checkpoint_step = kept["global_step"]
        self._compare(kept)
        config.ckpt_path = None if asked is None else str(self.checkpoint)
        version = None
        if self.checkpoint and (self.subcommand != "fit" or asked in ("last", "best")):
            version = version_folder(self.checkpoint, self.experiment)
        self.run, self.resumes = RunFolder(self.experiment, version), version is not None

    def _compare(self, kept: dict[str, Any]) -> None:
        """Tell how the configuration differs from what the checkpoint was trained with, or refuse it."""
        fill_config_dump(self)
        sections = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
        trained = {section: kept[key] for section, key in sections.items() if kept.get(key)}
        owner = f"ckpt_path={str(self.checkpoint)!r}"
        if self.checkpoint and not trained:
            say(f"{owner} keeps no configuration, so that the present one is taken at its word")
        for line in check(owner, trained, self.config_dump, self.subcommand, self._args):
            say(line)

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
        if config.logger in (None, True):
            kwargs["logger"] = RunLogger(self.run)
        name = "config.yaml" if self.subcommand == "fit" else f"config_{self.subcommand}.yaml"
        self.save_config_kwargs["config_filename"] = name
        own = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        own = [callback for callback in own if callback is not None]
        callbacks: list[Callback] = [ReportWriter(), PredictionWriter(), Ending()]
        if config.enable_checkpointing is False:
            self._without_checkpoints()
        else:
            callbacks.append(StopOnSignal())
        if any(isinstance(callback, ProgressBar) for callback in own):
            kwargs["enable_progress_bar"] = config.enable_progress_bar is not False
        elif config.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = sys.stdout.isatty()
            # first, because the others print below it once it has ended
            callbacks = [Progress() if sys.stdout.isatty() else SignsOfLife(), *callbacks]
        kwargs["callbacks"] = [self.run, *own, *callbacks]
        if config.barebones:
            kwargs |= self._bare()
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            owner = f"trainer.devices={config.devices}" if "devices" in str(error) else "trainer"
            raise InputError(f"{owner}: {' '.join(str(error).split())}") from error
        check_nodes(trainer)
        return trainer

    def _callback(self, kind: type[_Kind]) -> _Kind | None:
        return next((callback for callback in self.trainer.callbacks if isinstance(callback, kind)), None)

    def _without_checkpoints(self) -> None:
        """Leave out what saves: where nothing is to be kept, nothing can be gone on from after a signal either."""
        keys = parser_of(self, self.subcommand).callback_keys
        keys[:] = [key for key in keys if key not in ("best_checkpoint", "last_checkpoint")]

    def _bare(self) -> dict[str, Any]:
        """What ``barebones`` asks for: a loop, and nothing of what we add to it."""
        parser_of(self, self.subcommand).callback_keys.clear()
        self.save_config_callback = None
        nothing = ("logger", "enable_progress_bar", "log_every_n_steps", "enable_model_summary", "enable_checkpointing")
        return dict.fromkeys(nothing) | {"callbacks": None}

    def fit(self, **kwargs: Any) -> None:
        """Train, and say where everything is."""
        going_on = f", going on from {self.checkpoint} at step {self.checkpoint_step}" if self.checkpoint else ""
        self.run.greeting = f"training {self.experiment.name} on {self.trainer.strategy.root_device}{going_on}"
        if not cluster_environment(self.trainer).creates_processes_externally:
            mark_first()
        try:
            with self.run.opened(self.trainer, trains=True):
                self.trainer.fit(**kwargs, weights_only=True)
                self._tell_ending()
        except SIGTERMException:
            # in what comes before training: how Lightning ends then, as if all were well
            raise SystemExit(143) from None
        except SystemExit:
            # how Lightning ends after Ctrl-C
            last = self._callback(LastCheckpoint)
            way = "; the same command with --ckpt_path last goes on from the last checkpoint"
            show(f"interrupted{way if last and last.best_model_path else ', before anything was saved'}")
            raise SystemExit(130) from None
        except StoppedError as stopped:
            ignore_signals()
            refusal = requeue() if stopped.requeue and self.trainer.is_global_zero else None
            show(
                f"{stopped}; the same command with --ckpt_path last goes on from there"
                if stopped.checkpoint
                else stopped
            )
            if stopped.requeue and refusal is None:
                show("the job is put back into the queue")
                return
            if refusal:
                show(f"the job is not requeued: {refusal}")
            raise
        best = self._callback(BestCheckpoint)
        if best and best.best_model_score is not None:
            show(f"best checkpoint: {best.best_model_path} ({best.monitor} = {float(best.best_model_score):.4g})")
        if self.run.folder and (self.run.folder / "figures").exists():
            show(f"figures:         {self.run.folder / 'figures'}")
        if isinstance(self.trainer.logger, TensorBoardLogger):
            show(f"TensorBoard:     tensorboard --logdir {self.experiment.parent}")

    def _tell_ending(self) -> None:
        """Say why training ended; where there was none, do what the end of the run may not have come to."""
        ending = self._callback(Ending)
        if ending is None:
            return
        (why, way), step = ending.reason(self.trainer), self.trainer.global_step
        if self.run.trained or not self.checkpoint:
            # of processes that multiprocessing has started, nothing comes back
            if step:
                show(f"training ended after outer step {step}: {why}")
            elif self.run.folder and not self.run.trained:
                show(f"nothing was trained: {why}; to train, {way}")
            return
        if self.resumes and isinstance(self.model, BilevelLearner) and self.trainer.limit_val_batches:
            self._callback(ReportWriter).ends_fit = True
            self.trainer.validate(
                self.model, self.datamodule, ckpt_path=self.checkpoint, weights_only=True, verbose=False
            )
        show(f"nothing to train: {self.checkpoint} is at outer step {step}, and {why}; to go on, {way}")

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the validation tasks; the table is the report's."""
        show(f"validating {self.checkpoint}")
        with self.run.opened(self.trainer, trains=False):
            self.trainer.validate(**kwargs, weights_only=True, verbose=False)

    def test(self, **kwargs: Any) -> None:
        """Evaluate on the test tasks; the table is the report's."""
        show(f"testing {self.checkpoint}")
        with self.run.opened(self.trainer, trains=False):
            self.trainer.test(**kwargs, weights_only=True, verbose=False)

    def predict(self, **kwargs: Any) -> None:
        """Answer for the user's points.

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
        show(f"predicting with {self.checkpoint}")
        with self.run.opened(self.trainer, trains=False):
            self.trainer.predict(**kwargs, return_predictions=False, weights_only=True)


def run(args: Sequence[str]) -> None:
    """Run the command line with settings that suit a terminal.

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
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            MetalitCLI(args)
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


def _class_names() -> set[str]:
    def below(family: type) -> Iterator[type]:
        for member in family.__subclasses__():
            yield member
            yield from below(member)

    return {member.__name__ for family in _FAMILIES for member in (family, *below(family))}


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """A warning of ours is a line for the user, who has no use for the line of code that gave it."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    text = f"metalit: warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno)
    sys.stderr.write(text)
