"""Processes and devices in torch: join the others, take a device, add up over all."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from convit.engine.world import World, rendezvous

BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl"}


def start(world: World, device: torch.device) -> None:
    """Join the process group of ``world``, if it has more than one process.

    Raises:
        OSError: Not all of them have come within ``CONVIT_JOIN_SECONDS`` (60); torchrun has a limit of its own.
    """
    if world.size == 1 or dist.is_initialized():
        return
    backend = BACKENDS.get(device.type, "gloo")
    if world.launcher == "torchrun":  # its agent already holds the port
        dist.init_process_group(backend, init_method="env://", rank=world.rank, world_size=world.size)
        return
    address, port = rendezvous(world)
    seconds = float(os.environ.get("CONVIT_JOIN_SECONDS") or 60)
    try:
        store = dist.TCPStore(address, port, world.size, world.rank == 0, timedelta(seconds=seconds))
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
    except RuntimeError as error:  # torch's DistError is one
        raise OSError(
            f"process {world.rank}: the {world.size} processes of {world.launcher} did not meet at {address}:{port} within {seconds:g} s "
            f"({(str(error).splitlines() or ['no reason given'])[0][:200]}). One died or is late: CONVIT_JOIN_SECONDS is how long to wait"
        ) from None


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


def gathered(values: list[Any], world: World) -> list[Any]:
    """The lists of all processes, one after the other; the same on every process."""
    if world.size == 1:
        return values
    lists: list[Any] = [None] * world.size
    dist.all_gather_object(lists, values)
    return [value for one in lists for value in one]


def total(values: list[float], world: World, device: torch.device) -> list[float]:
    """Sum each of ``values`` over the processes, in float64 where the device has it; the same on every process."""
    if world.size == 1:
        return values
    kind = torch.float32 if device.type in ("mps", "npu") else torch.float64
    tensor = torch.tensor(values, dtype=kind, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()
