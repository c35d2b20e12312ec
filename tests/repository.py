"""Where the repository is, and the small sizes at which tests run its configs."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = ("--trainer.max_steps=6", "--trainer.val_check_interval=0.5", "--trainer.log_every_n_steps=2")
TINY_BY_CLASS = {
    "TaskDataModule": ("--data.train.tasks=4", "--data.val.tasks=6", "--data.test.tasks=6", "--figures.tasks=0"),
    "MetaLearner": ("--model.compile=false", "--model.fused_steps=1"),  # which have tests of their own
    "BilevelLearner": ("--model.eval_steps=5",),
}
