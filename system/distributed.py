"""Several processes of one job, as torchrun starts them. In a single process nothing happens here.

    torchrun --nproc_per_node 2 main.py -m train -d DAVIS
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def start() -> None:
    """Join the other processes, if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list) -> list:
    """The items that are this process's to do."""
    return items[rank()::count()]


def gather(value) -> list:
    """The values of all processes, in the order of their ranks."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
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
    """The process of rank 0 goes through the context before the others do."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and count() > 1:
        dist.barrier()
