"""Communication between the processes of one job, started by torchrun.

    torchrun --nproc_per_node 2 main.py -m train -d DAVIS

In a single process, rank is 0, count is 1, and nothing is sent.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def start() -> None:
    """Connect to the job's other processes, if torchrun started several.

    Both backends: NCCL averages gradients on GPUs, Gloo gathers Python objects on the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def end() -> None:
    """Disconnect from the other processes; without it torch warns at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list) -> list:
    """This process's share of the items: every `count()`-th, so that shares are of equal size."""
    return items[rank()::count()]


def gather(value) -> list:
    """The values of all processes, in the order of their ranks; every process gets all of them."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes.

    All gradients are sent as one flat tensor: a message per parameter would cost more in latency.
    """
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= count()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 runs the body of the `with` statement before the other processes do.

    For downloads and locks, which must not run at the same time.
    """
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and count() > 1:
        dist.barrier()
