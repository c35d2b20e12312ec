"""Runs that are killed at random moments, gone on with, and held against a run that nobody disturbed."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forks import ended, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves

from metalit.__main__ import main

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
COMMON = (
    *("--ckpt_path=auto", "--last_checkpoint.seconds=0.05", "--figures.tasks=0"),
    *("--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=10"),
)
META = ("--model.compile=false", "--data.train.tasks=4", "--data.val.tasks=4", "--data.test.tasks=4")
TWO = (
    *("--trainer.devices=2", "--trainer.strategy.timeout=0:00:20"),
    "--trainer.strategy.process_group_backend=gloo",
)
# of the clock, not of what is learned
OF_TIME = ("steps_per_second", "seconds")
_PATIENCE = 90  # seconds that a killed run has to end; ranks wait for each other for 20


class Case(NamedTuple):
    """A run: its learner, how many steps are fused, on how many ranks."""

    name: str
    config: str
    steps: int
    options: tuple[str, ...] = ()
    ranks: int = 1

    def command(self, root: Path) -> list[str]:
        """What trains it below a folder, from wherever it stands."""
        own = (
            f"--trainer.max_steps={self.steps}",
            f"--trainer.val_check_interval={self.steps // 4}",
            f"--trainer.default_root_dir={root}",
        )
        several = ("--config=configs/trainer/gpus.yaml",) if self.ranks > 1 else ()
        configs = (f"--config=configs/{self.config}.yaml", *several, "--config=configs/trainer/cpu.yaml")
        return ["fit", *configs, *COMMON, *self.options, *own, *(TWO if self.ranks > 1 else ())]


CASES = (
    Case("meta", "sine_maml", 200, (*META, "--model.fused_steps=1")),
    Case("meta, fused", "sine_maml", 400, (*META, "--model.fused_steps=10")),
    Case("meta, two ranks", "sine_maml", 120, (*META, "--model.fused_steps=1"), 2),
    Case("bilevel", "bilevel_ridge", 120, ("--model.compile=false",)),
    Case("bilevel, fused", "bilevel_ridge", 200, ("--model.compile=false", "--model.fused_steps=10")),
    Case("bilevel, two ranks", "bilevel_ridge", 80, ("--model.compile=false", "--data.draws=2"), 2),
    Case("supervised", "sam_digits", 200),
    Case("supervised, two ranks", "sam_digits", 120, (), 2),
    Case("matrix", "low_rank", 200, ("--model.compile=false",)),
)


@dataclass
class Counts:
    """What was done, and what was lost."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    faults: list[str] = field(default_factory=list)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.runs + other.runs,
            self.kills + other.kills,
            self.compared + other.compared,
            [*self.faults, *other.faults],
        )

    def __str__(self) -> str:
        by_kind = ", ".join(f"{number} {kind}" for kind, number in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({by_kind}) in {self.runs} runs; {self.compared} values compared bit for bit; "
            f"{len(self.faults)} lost, differing or damaged"
        )


def undisturbed(case: Case, root: Path) -> tuple[dict[str, Any], float]:
    """What the run leaves where nobody disturbs it, and how many seconds it takes."""
    begun = time.monotonic()
    statuses = _run(case, root)
    seconds = time.monotonic() - begun
    assert statuses == [0] * case.ranks, (root / "log").read_text()
    return left_by(root), seconds


def killed(case: Case, root: Path, expected: dict[str, Any], seconds: float, kills: int, seed: int) -> Counts:
    """Kill a run at random moments, so many times unless it ends before, and compare what it leaves in the end.

    Args:
        case: the run.
        root: where it runs.
        expected: what it leaves undisturbed.
        seconds: how long it takes undisturbed; the first kill comes before.
        kills: how many.
        seed: of the moments, and of how it is killed.
    """
    draw, counts = random.Random(f"{case.name} {seed}"), Counts(runs=1)
    where = f"{case.name}, seed {seed}"
    for number in range(kills):
        kind, statuses = _killed_once(case, root, draw, seconds)
        text = (root / "log").read_text()
        if None in statuses:
            counts.faults.append(f"{where}: kill {number} ({kind}): a process did not end: {text[-2000:]}")
        if "Traceback" in text:
            counts.faults.append(f"{where}: kill {number} ({kind}): a traceback: {text[-2000:]}")
        if all(status == 0 for status in statuses):
            break
        counts.kills[kind] += 1
    statuses = _run(case, root)
    if statuses != [0] * case.ranks:
        counts.faults.append(f"{where}: it cannot be gone on with: {(root / 'log').read_text()[-2000:]}")
        return counts
    found = left_by(root)
    for name in {**expected, **found}:
        counts.compared += 1
        now, then = found.get(name), expected.get(name)
        if not _equal(then, now):
            counts.faults.append(f"{where}: {name} is {now!r:.200}, not {then!r:.200}")
    return counts


def _killed_once(case: Case, root: Path, draw: random.Random, seconds: float) -> tuple[str, list[int | None]]:
    """Start the run, and kill it; returns how, and with which statuses its processes ended, None for one that hangs."""
    place = draw.choice(("random",) * 4 + ("in a save", "in a report"))
    sent, moment, in_save = draw.choice(SIGNALS), draw.uniform(0.1, 0.9) * seconds, draw.randrange(1, 6)
    ranks = _start(case, root, "" if place == "random" else place, in_save)
    if place != "random":
        return place, ended(ranks, _PATIENCE)
    _until(moment, ranks)
    if sent == signal.SIGKILL:
        for rank in ranks:
            rank.kill()
    else:
        told = draw.choice(ranks)
        if told.is_alive():
            os.kill(told.pid, sent)
    return sent.name, ended(ranks, _PATIENCE)


def left_by(root: Path) -> dict[str, Any]:
    """All that a run leaves and that counts: by name, tensors and plain values."""
    # what is killed before it has saved anything begins anew, in a folder of its own
    folder = max(root.glob("lightning_logs/*/version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    found: dict[str, Any] = {"parts of files": [str(path) for path in folder.rglob("*.part")]}
    for name in ("last", "best"):
        path = folder / f"checkpoints/{name}.ckpt"
        if path.exists():
            kept = torch.load(path, weights_only=True)
            for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
                for number, leaf in enumerate(tree_leaves(kept.get(key))):
                    found[f"{name}: {key} {number}"] = leaf
            saver = next(part for key, part in kept["callbacks"].items() if key.startswith("BestCheckpoint"))
            found[f"{name}: best score"] = saver["best_model_score"]
    for path in sorted(folder.rglob("*.csv")):
        found[f"file {path.relative_to(folder)}"] = path.read_text()
    for name, value in _scalars(folder):
        found[name] = value
    return found


def _scalars(folder: Path) -> Iterator[tuple[str, Any]]:
    """Each scalar of TensorBoard by its step: all the values that were ever written for it."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if not any(part in tag for part in OF_TIME):
            for event in events.Scalars(tag):
                yield f"scalar {tag} at {event.step}", event.value


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        alike = first.shape == second.shape and first.dtype == second.dtype
        return alike and bool(torch.isclose(first, second, rtol=0, atol=0, equal_nan=True).all())
    # a NaN is itself
    return type(first) is type(second) and (first == second or repr(first) == repr(second) == "nan")


def _run(case: Case, root: Path) -> list[int | None]:
    return ended(_start(case, root), 300)


def _start(case: Case, root: Path, place: str = "", number: int = 0) -> list[Any]:
    root.mkdir(exist_ok=True)
    return start_ranks(case.ranks, root / "log", _main_that_dies, place, number, case.command(root))


def _main_that_dies(place: str, number: int, command: list[str]) -> int:
    """The command line, in a process that kills itself in its so manieth save, or where it writes its last report."""
    if place == "in a save":
        save, saved = torch.save, Counter[str]()

        def half(checkpoint: Any, file: Any, *arguments: Any, **options: Any) -> None:
            saved["times"] += 1
            if saved["times"] >= number:
                file.write(b"half of it")
                if hasattr(file, "flush"):
                    file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(checkpoint, file, *arguments, **options)

        torch.save = half
    elif place == "in a report":
        from metalit.callbacks import ReportWriter

        ReportWriter.on_train_end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    return main(command)


def _until(seconds: float, ranks: list[Any]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(rank.is_alive() for rank in ranks):
        time.sleep(0.01)
