"""Where this process stands among those that a launcher started: torchrun, Open MPI, MPICH (Hydra, Intel MPI), Slurm or MindSpore's
msrun alike. Imports no framework."""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

# launcher -> its variables for (rank, world size, local rank, local size); the first two must be set. Of Slurm's, only srun sets
# SLURM_STEP_*: a script under sbatch alone is one process.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "msrun": ("RANK_ID", "MS_WORKER_NUM", "DEVICE_ID", ""),
    "rank table": ("RANK_ID", "RANK_SIZE", "DEVICE_ID", ""),  # Ascend's
}
JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "PMI_JOBID", "HYDI_CONTROL_FD")


class World(NamedTuple):
    """This process among ``size``; ``local_rank`` counts on this machine. The scheduler that msrun starts too has the rank -1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = ""


def find_world(environ: Mapping[str, str] = os.environ) -> World:
    """Read rank and size from the launcher's variables; a world of one if there are none.

    Raises:
        ValueError: A variable is no number.
    """
    if environ.get("MS_ROLE") == "MS_SCHED":
        return World(-1, int(environ.get("MS_WORKER_NUM", "1")), -1, "msrun")
    for launcher, (rank, size, local_rank, _) in LAUNCHERS.items():
        if rank in environ and size in environ:
            try:
                return World(int(environ[rank]), int(environ[size]), int(environ.get(local_rank, environ[rank])), launcher)
            except ValueError:
                names = f"{rank}, {size} and {local_rank}"
                raise ValueError(f"{names} must be whole numbers: {[environ.get(n) for n in (rank, size, local_rank)]}") from None
    return World()


def rendezvous(world: World, environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """The address and port where the processes of ``world`` meet: MASTER_ADDR and MASTER_PORT, or what the launcher tells.

    Raises:
        ValueError: Several machines take part and MASTER_ADDR is not set (Slurm's node list gives it).
    """
    # a port drawn from the job's name, so that two jobs on one machine rarely meet
    job = next((environ[name] for name in JOBS if environ.get(name)), "")
    port = int(environ.get("MASTER_PORT") or 20000 + int(hashlib.blake2b(job.encode(), digest_size=4).hexdigest(), 16) % 20000)
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"], port
    if world.launcher == "srun":
        return first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")), port
    here = environ.get(LAUNCHERS[world.launcher][3], "")
    if here.isdigit() and int(here) < world.size:
        raise ValueError(
            f"{world.launcher} started {world.size} processes, {here} of them on this machine: "
            "set MASTER_ADDR to the name of the machine of rank 0 for all of them"
        )
    return "127.0.0.1", port


def first_host(nodelist: str) -> str:
    """The first machine of a Slurm node list: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if not match:
        raise ValueError(f"cannot read the Slurm node list {nodelist!r}; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())
