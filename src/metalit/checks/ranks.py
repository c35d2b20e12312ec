"""Which processes can train as one."""

import os

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from metalit.errors import InputError
from metalit.private_lightning import cluster_environment

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
    environment = cluster_environment(trainer)
    # Lightning's own knows of none but those that it starts itself, and is also that of an interactive job of SLURM
    own = isinstance(environment, LightningEnvironment)
    started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if started == 1 and environment.creates_processes_externally and not own and "SLURM_NTASKS" not in os.environ:
        started = environment.world_size()
    if started > 1 and (own or started != trainer.world_size):
        raise InputError(
            f"trainer.devices, trainer.num_nodes: {started} processes were started, but {trainer.num_devices} "
            f"device(s) on each of {trainer.num_nodes} node(s) would have each train alone; give the processes of a "
            "node as trainer.devices, and the nodes as trainer.num_nodes, and on SLURM use sbatch scripts/slurm.sbatch"
        )


def check_nodes(trainer: Trainer) -> None:
    """Check that somebody starts the other nodes: a process would wait for them for minutes without a word.

    Raises:
        InputError: several nodes, and neither torchrun nor SLURM nor the user's own MASTER_ADDR.
    """
    environment = cluster_environment(trainer)
    alone = isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ
    if trainer.num_nodes > 1 and alone:
        raise InputError(
            f"trainer.num_nodes={trainer.num_nodes}: nothing here starts the other nodes; use sbatch "
            "scripts/slurm.sbatch or torchrun --nnodes, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node"
        )
