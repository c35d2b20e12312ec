"""The record of a run: its configuration, what it depended on, and what came out, so that it can be repeated."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from metalit.callbacks.facts import data_hashes, git_state, hardware, versions, weights_hash, without_places
from metalit.runs import run_folder

RECORD = "run.json"


class RunRecord(Callback):
    """Writes ``run.json`` into the folder of a run: when training begins, and again when it ends.

    It holds the command, the configuration, versions, the git commit, the hash of every data file, seeds and hardware;
    at the end the steps, the time, and the hash of the weights. It names no environment variable, person, machine or
    absolute path. Where a run is gone on with, the former records are kept under ``earlier``.

    Args:
        command: the arguments of the command line.
        config: the resolved configuration, as plain values.
    """

    def __init__(self, command: Sequence[str], config: Mapping[str, Any]) -> None:
        self._command = list(command)
        self._config = dict(config)
        self._record: dict[str, Any] = {}
        self._began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write what the run depends on, once its start is not refused any more."""
        folder = run_folder(trainer) if trainer.is_global_zero and not self._record else None
        if folder is None:
            return
        self._began = time.monotonic()
        self._record = {
            "command": without_places(self._command),
            "config": without_places(self._config),
            "versions": versions(),
            "git": git_state(),
            "data": data_hashes(self._config.get("data")),
            "seed": self._config.get("seed_everything"),
            "hardware": hardware(pl_module.device),
            "processes": trainer.world_size,
            "from_step": trainer.global_step,
        }
        before = read_record(folder)
        if before and trainer.global_step:
            self._record["earlier"] = [*before.pop("earlier", []), before]
        self._write(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what came out."""
        if self._record and trainer.is_global_zero and (folder := run_folder(trainer)):
            self._record["end"] = {
                "steps": trainer.global_step,
                "seconds": round(time.monotonic() - self._began, 3),
                "weights": weights_hash(pl_module.state_dict()),
            }
            self._write(folder)

    def _write(self, folder: Path) -> None:
        # replaced at once: who is killed meanwhile leaves the former one
        part = folder / f".{RECORD}.part"
        part.write_text(json.dumps(self._record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(folder / RECORD)


class SaveConfig(SaveConfigCallback):
    """Writes the configuration into the folder of the run, once its start is not refused any more."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write ``config.yaml``."""
        self.save_config(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``config_validate.yaml``."""
        if trainer.state.fn == "validate" and self.config_filename == "config_validate.yaml":
            self.save_config(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``config_test.yaml``."""
        self.save_config(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``config_predict.yaml``."""
        self.save_config(trainer, pl_module, "predict")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, once and on rank 0."""
        folder = run_folder(trainer)
        if trainer.is_global_zero and folder and not self.already_saved:
            self.parser.save(
                self.config, folder / self.config_filename, skip_none=False, overwrite=True, multifile=False
            )
        self.already_saved = True


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run; None where there is none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None
