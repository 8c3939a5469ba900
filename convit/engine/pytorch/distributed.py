"""Where this process stands among those that a launcher started: torchrun, Open MPI, MPICH (Hydra, Intel MPI) or Slurm alike."""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

# launcher -> its variables for (rank, world size, local rank, local size); the first two must be set. Of Slurm's, only srun sets
# SLURM_STEP_*: a script under sbatch alone is one process.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "PMI_JOBID", "HYDI_CONTROL_FD")
BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl"}


class World(NamedTuple):
    """This process among ``size``; ``local_rank`` counts on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500
    launcher: str = ""


def find_world(environ: Mapping[str, str] = os.environ) -> World:
    """Read rank, size and rendezvous from the launcher's variables; a world of one if there are none.

    Raises:
        ValueError: Several machines take part and MASTER_ADDR is not set (Slurm's node list gives it), or a variable is no number.
    """
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        if rank not in environ or size not in environ:
            continue
        try:
            world = World(int(environ[rank]), int(environ[size]), int(environ.get(local_rank, environ[rank])), launcher=launcher)
        except ValueError:
            names = f"{rank}, {size} and {local_rank}"
            raise ValueError(f"{names} must be whole numbers: {[environ.get(n) for n in (rank, size, local_rank)]}") from None
        if world.size == 1:
            return world
        return world._replace(address=_address(environ, world, local_size), port=_port(environ))
    return World()


def _address(environ: Mapping[str, str], world: World, local_size: str) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if world.launcher == "srun":
        return first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    here = environ.get(local_size, "")
    if here.isdigit() and int(here) < world.size:
        raise ValueError(
            f"{world.launcher} started {world.size} processes, {here} of them on this machine: "
            "set MASTER_ADDR to the name of the machine of rank 0 for all of them"
        )
    return "127.0.0.1"


def _port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT, or one drawn from the job's name, so that two jobs on one machine rarely meet."""
    if "MASTER_PORT" in environ:
        return int(environ["MASTER_PORT"])
    job = next((environ[name] for name in JOBS if environ.get(name)), "")
    return 20000 + int(hashlib.blake2b(job.encode(), digest_size=4).hexdigest(), 16) % 20000


def first_host(nodelist: str) -> str:
    """The first machine of a Slurm node list: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if not match:
        raise ValueError(f"cannot read the Slurm node list {nodelist!r}; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def start(world: World, device: torch.device) -> None:
    """Join the process group of ``world``, if it has more than one process."""
    if world.size > 1 and not dist.is_initialized():
        where = f"tcp://{world.address}:{world.port}"
        if world.launcher == "torchrun":
            where = "env://"  # its agent already holds the port
        dist.init_process_group(BACKENDS.get(device.type, "gloo"), init_method=where, rank=world.rank, world_size=world.size)


def choose_device(name: str, world: World) -> torch.device:
    """The device called ``name``; "auto" takes an accelerator if there is one. Each process of a machine takes its own.

    Raises:
        ValueError: There is no such device, or fewer of them than processes on this machine.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = accelerator.type if accelerator else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type in BACKENDS and device.index is None:
        count = torch.accelerator.device_count()
        if world.local_rank >= count:
            raise ValueError(f"process {world.local_rank} of this machine has no {device.type} device: there are {count}")
        device = torch.device(device.type, world.local_rank)
        torch.accelerator.set_device_index(world.local_rank)
    return device


def total(values: list[float], world: World, device: torch.device) -> list[float]:
    """Sum each of ``values`` over the processes, in float64 where the device has it; the same on every process."""
    if world.size == 1:
        return values
    kind = torch.float32 if device.type in ("mps", "npu") else torch.float64
    tensor = torch.tensor(values, dtype=kind, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()
