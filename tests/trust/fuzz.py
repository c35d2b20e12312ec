"""Command lines and files that nobody has thought of: each ends in a result, or in one line that says what is wrong."""

import contextlib
import io
import os
import random
import re
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from metalit.__main__ import main
from metalit.errors import InputError

LONGEST = 500
SECONDS = 30
BYTES = 4 * 2**30  # beyond what the process has: nothing that is tiny takes more
FINE = (0, 1, 2)

# fmt: off
VALUES = (
    "0", "1", "-1", "2", "3.5", "1e9", "-1e-9", "1e400", "nan", "inf", "-inf", "2147483648",
    "9223372036854775808", "", " ", "null", "None", "true", "off", "~", "''", "[]", "{}", "[1, 2, 3]",
    "[[1], [2]]", "{a: 1}", "{a: {b: [c]}}", "Sine", "SGD", "metalit.inner.SGD", "os.system", "builtins.eval",
    "torch.nn.Linear", "no.such.Thing", "FewShot", "auto", "all", "best", "../..", "/dev/null", "/dev/full",
    "data/gapminder.csv", "configs", "a" * 5000, "é☃𝄞", "\u202e", "%s%n", "${trainer.max_steps}", "${nothing}",
    "${", "!!python/object:os.system", "&a *a", "1_000", "0x10", "1:30", "2026-01-01",
)
# fmt: on
OPTIONS = (
    *[
        "seed_everything",
        "threads",
        "experiment",
        "ckpt_path",
        "figures.tasks",
        "figures.steps",
        "best_checkpoint.monitor",
        "best_checkpoint.mode",
        "last_checkpoint.seconds",
        "trainer.max_steps",
        "trainer.max_epochs",
        "trainer.max_time",
        "trainer.precision",
        "trainer.devices",
        "trainer.accelerator",
        "trainer.val_check_interval",
        "trainer.limit_val_batches",
        "trainer.log_every_n_steps",
        "trainer.accumulate_grad_batches",
        "trainer.gradient_clip_val",
        "trainer.logger",
        "trainer.callbacks",
        "trainer.overfit_batches",
        "trainer.num_sanity_val_steps",
        "trainer.strategy",
        "trainer.barebones",
        "trainer.enable_progress_bar",
        "trainer.deterministic",
        "trainer.check_val_every_n_epoch",
        "trainer.plugins",
        "model",
        "model.class_path",
        "model.problem",
        "model.problem.network",
        "model.problem.network.sizes",
        "model.problem.adapt",
        "model.problem.network.activation",
        "model.problem.network.dropout",
        "model.problem.loss",
        "model.problem.proximal",
        "model.inner_optimizer",
        "model.inner_optimizer.lr",
        "model.inner_optimizer.momentum",
        "model.hypergradient",
        "model.hypergradient.steps",
        "model.hypergradient.class_path",
        "model.eval_steps",
        "model.compile",
        "model.fused_steps",
        "model.tasks_per_chunk",
        "model.optimizer",
        "model.optimizer.lr",
        "model.scheduler",
        "model.clip_norm",
        "model.lr_by_name",
        "data",
        "data.tasks",
        "data.tasks.noise",
        "data.tasks.amplitude",
        "data.tasks.x",
        "data.train",
        "data.train.tasks",
        "data.train.shots",
        "data.train.queries",
        "data.train.ways",
        "data.val.tasks",
        "data.test.tasks",
        "data.test.queries",
        "data.seed",
        "data.predict_file",
        "data.predict_folder",
        "data.predict_one_task",
        "no.such.key",
        "-",
        "model.",
        ".model",
    ],
    "",
)
BASE = ("--config=configs/sine_maml.yaml", "--model.compile=false", "--model.fused_steps=1", "--trainer.fast_dev_run=1")
SIZES = ("--data.train.tasks=2", "--data.val.tasks=2", "--data.test.tasks=2")


class HangError(BaseException):
    """No exception that is caught on the way, as a ``TimeoutError`` is for an ``OSError``."""


class RanksError(BaseException):
    """Other processes would be started, with the command line of this one: that of the tests."""


@dataclass
class Fed:
    """How many cases there were, how they ended, and which did not end as they must."""

    ends: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def count(self, end: str) -> None:
        """Count one."""
        self.ends[end] = self.ends.get(end, 0) + 1

    def __add__(self, other: "Fed") -> "Fed":
        ends = {end: self.ends.get(end, 0) + other.ends.get(end, 0) for end in {**self.ends, **other.ends}}
        return Fed(ends, [*self.faults, *other.faults])

    def __str__(self) -> str:
        ends = ", ".join(f"{number} {end}" for end, number in sorted(self.ends.items()))
        return f"{sum(self.ends.values())} cases ({ends}); {len(self.faults)} not as they must be"


def judge_command(args: list[str], fed: Fed, kind: str) -> None:
    """Run a command line in this process, and see how it ends."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = None
    seconds = SECONDS * (4 if args[0] == "check" else 1)  # which measures for up to a minute
    with _alone(), _within(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(args)
        except SystemExit as left:
            status = left.code
        except BaseException as error:  # also what a hang is ended with
            status = f"{type(error).__name__}: {error}"
    if isinstance(status, str) and status.startswith("RanksError"):
        fed.count(f"{kind}: ready to start ranks")
        return
    if isinstance(status, str) and status.startswith("HangError") and "is a very large number" in err.getvalue():
        fed.count(f"{kind}: long, as was warned")
        return
    lines = [line for line in err.getvalue().splitlines() if line.startswith("metalit: ") and "warning" not in line]
    told = [line for line in lines if re.match(r"metalit: (error|stopped)", line)]
    fine = status in FINE and "Traceback" not in out.getvalue() + err.getvalue()
    answers = status == 1 and args[0] in ("check", "reproduce")  # that something is wrong, in a report
    fine &= (len(told) == (1 if status else 0) or answers) and all(len(line) <= LONGEST for line in told)
    fed.count(f"{kind}: {'done' if status == 0 else 'refused' if fine else 'FAULT'}")
    if not fine:
        fed.faults.append(f"metalit {args!r:.1500} ended with {status!r}: {(told or [err.getvalue()[-400:]])!r:.900}")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise RanksError

    patch = pytest.MonkeyPatch()
    for launcher in (_SubprocessScriptLauncher, _MultiProcessingLauncher):
        patch.setattr(launcher, "launch", refuse)
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            patch.undo()


def judge_call(call: Callable[[], Any], fed: Fed, kind: str, what: str) -> None:
    """Call what reads a file, and see how it ends."""
    try:
        with _within(SECONDS), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except InputError as error:
        fine = len(f"metalit: error: {error}") <= LONGEST and "\n" not in str(error)
        fed.count(f"{kind}: {'refused' if fine else 'FAULT'}")
        if not fine:
            fed.faults.append(f"{what:.600}: {len(str(error))} letters: {error!s:.700}")
    except BaseException as error:
        fed.count(f"{kind}: FAULT")
        fed.faults.append(f"{what:.600}: {type(error).__name__}: {error!s:.500}")
    else:
        fed.count(f"{kind}: done")


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise HangError(f"{seconds} s have passed")

    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (has + BYTES, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


# ---- what is fed


def command_line(draw: random.Random, root: Path) -> list[str]:
    """A right command line, with some options that may be anything."""
    stage = draw.choice(("fit",) * 9 + ("validate", "test", "predict") * 3 + ("fti", ""))
    strange = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name, value = draw.choice(OPTIONS), draw.choice(VALUES)
        strange += [f"--{name}={value}"] if draw.random() < 0.8 else [f"--{name}", value]
    points = [f"--data.predict_file={root}/points.csv"] if stage == "predict" else []
    return [stage, *BASE, *SIZES, f"--trainer.default_root_dir={root}", *points, *strange]


def spoilt_yaml(draw: random.Random, text: str) -> bytes:
    """A configuration that was edited by a cat."""
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2, 4))):
        where = draw.randrange(len(lines)) if lines else 0
        what = draw.randrange(9)
        if not lines:
            break
        if what == 0:
            del lines[where]
        elif what == 1:
            lines.insert(where, lines[draw.randrange(len(lines))])
        elif what == 2:
            lines[where] = " " * draw.randrange(6) + lines[where].lstrip()
        elif what == 3:
            lines[where] = f"{lines[where].split(':')[0]}: {draw.choice(VALUES)}"
        elif what == 4:
            place = draw.randrange(len(lines[where]) + 1)
            lines[where] = lines[where][:place] + draw.choice("{}[]:,#&*!|>'\"%@`\t\0é") + lines[where][place:]
        elif what == 5:
            lines[where] = lines[where].replace(":", "", 1)
        elif what == 6:
            lines[where] = f"{draw.choice(OPTIONS).split('.')[-1] or 'x'}: {draw.choice(VALUES)}"
        elif what == 7:
            lines = lines[: where + 1]
        else:
            lines[where] = lines[where].upper()
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return spoilt_bytes(draw, content) if draw.random() < 0.1 else content


def spoilt_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bytes of which some were flipped, lost or put in."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 2, 10))):
        if not found:
            break
        place = draw.randrange(len(found))
        what = draw.randrange(4)
        if what == 0:
            found[place] ^= 1 << draw.randrange(8)
        elif what == 1:
            del found[place : place + draw.randrange(1, 40)]
        elif what == 2:
            found[place:place] = draw.randbytes(draw.randrange(1, 40))
        else:
            del found[place:]
    return bytes(found)


# fmt: off
CELLS = (
    "", " ", "1", "2.5", "-3", "1e5", "1e400", "nan", "NA", "x", "a,b", "\"", "\"q\"", "1,5", "2020-01-01",
    "0x1F", "é", "\0", "∞", "-0",
)
# fmt: on


def table(draw: random.Random, header: list[str], asked: str = "") -> bytes:
    """A CSV file that somebody has made by hand, of five two as they should be; half of a column may be empty."""
    separator, often = draw.choice(",,,,;\t|"), draw.choice((0, 0, 0.02, 0.1, 0.5))
    names = [*header]
    if draw.random() < 0.3:
        draw.shuffle(names)
    if draw.random() < often:
        names[draw.randrange(len(names))] = draw.choice(CELLS)
    lines = [separator.join(names)]
    for row in range(draw.choice((12, 40, 40, draw.randrange(5)))):
        cells = {name: f"{draw.uniform(-5, 5):.3f}" for name in header} | {header[0]: f"t{row // 4}"}
        if row % 4 > 1:
            cells |= {asked: ""}
        found = [cells.get(name, "1") for name in names]
        if draw.random() < often:
            found[draw.randrange(len(found))] = draw.choice(CELLS)
        if draw.random() < often / 4:
            found = found[: draw.randrange(len(found))] + ["9"] * draw.randrange(3)
        lines.append(separator.join(found))
    content = draw.choice(("\n", "\r\n", "\n", "\r")).join(lines).encode()
    return spoilt_bytes(draw, content) if draw.random() < often else content
