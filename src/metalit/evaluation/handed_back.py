"""What ``trainer.validate`` and ``trainer.test`` return."""

from lightning.pytorch import Trainer

from metalit.private_lightning import returned_metrics


class HandedBack:
    """Puts the metrics of an evaluation into the dictionaries that ``trainer.validate`` and ``trainer.test`` return.

    Lightning fills those with what it writes to the loggers by itself, all of it, and over a count of batches. Ours are
    written over the outer step, and not all of them.
    """

    def __init__(self) -> None:
        self._returned: list[dict[str, float]] = []
        self._metrics: dict[str, float] = {}

    def keep(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Take the metrics at the end of an evaluation's epoch, before Lightning logs its own."""
        loop = {"validate": trainer.validate_loop, "test": trainer.test_loop}.get(trainer.state.fn or "")
        # one dictionary for each loader, taken away from the loop before the evaluation's end
        self._returned, self._metrics = [] if loop is None else list(returned_metrics(loop)), metrics

    def give(self) -> None:
        """Hand them back at the evaluation's end, when Lightning has logged its own."""
        for returned in self._returned:
            returned.update(self._metrics)
        self._returned = []
