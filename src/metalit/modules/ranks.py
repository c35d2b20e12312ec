"""Which processes can train as one: each holds all parameters, and none was started that the Trainer does not know."""

import os

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from metalit.errors import InputError

_SPLIT = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def check_ranks(trainer: Trainer) -> None:
    """Check that the ranks of a trainer can be one.

    Raises:
        InputError: a strategy that splits the parameters among processes; processes that torchrun or SLURM started,
            and each of which would train alone.
    """
    strategy = trainer.strategy
    if isinstance(strategy, _SPLIT):
        raise InputError(
            f"trainer.strategy: {type(strategy).__name__} splits the parameters among processes, and each needs all of "
            "them to differentiate through the inner loop; use ddp, and model.tasks_per_chunk to save memory"
        )
    started, known = _started(trainer._accelerator_connector.cluster_environment), trainer.world_size
    if started not in (None, known):
        raise InputError(
            f"trainer.devices, trainer.num_nodes: {started} processes were started, but {trainer.num_devices} "
            f"device(s) on each of {trainer.num_nodes} node(s) make {known}, and each process would train alone; give "
            "the processes of a node as trainer.devices, and the nodes as trainer.num_nodes"
        )


def _started(environment: ClusterEnvironment) -> int | None:
    """How many processes others have started, if they have."""
    # Lightning's own environment starts as many as it is told
    if not environment.creates_processes_externally or isinstance(environment, LightningEnvironment):
        return None
    if isinstance(environment, SLURMEnvironment):
        # those of srun; a notebook in a larger allocation is one process
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
        return int(tasks) if tasks else None
    return environment.world_size()
