"""One process or many: who this rank is and what the ranks tell each other. torchrun starts them:

torchrun --standalone --nproc-per-node 8 -m gpt.train …                               # one machine
torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d \\
         --rdzv-endpoint FIRST_MACHINE:29500 -m gpt.train … --resume                   # on each of two

Several machines must see the same output folder. When a rank dies, torchrun ends the others, and starts all again up
to --max-restarts times; with --resume they go on from the last checkpoint.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.device import find_device

PATIENCE = timedelta(minutes=30)  # ranks wait so long for each other: rank 0 may be writing a large checkpoint


@dataclass(frozen=True)
class Ranks:
    """This process among its peers: rank 0 … world - 1, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True for the one rank that prints, logs and writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks of a tensor that each of them has."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def gather(self, thing: Any) -> list[Any]:
        """Return what each rank has, in the order of the ranks, on every rank."""
        if self.world == 1:
            return [thing]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, thing)
        return found

    def follow(self, thing: Any) -> Any:
        """Return what rank 0 has, on every rank."""
        return self.gather(thing)[0]


def is_first_process() -> bool:
    """Return whether this is rank 0, or alone; it may be asked before the ranks have joined, and after."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the ranks that torchrun started, by NCCL among GPUs and Gloo among CPUs; a lone process is rank 0 of 1.

    device: as `gpt.device.find_device` takes it; of several GPUs each rank of a node takes its own. Raises UserError.
    """
    found = find_device(device)
    if not dist.is_torchelastic_launched():
        yield Ranks(0, 1, found)
        return
    if found.type == "cuda":
        found = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(found)
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun keeps one store over its restarts; Gloo would find there, and wait for, ranks that have died
    store = dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}-of-{world}", store)
    backend = "nccl" if found.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    yield Ranks(dist.get_rank(), dist.get_world_size(), found)
    # not after an error: a rank that waits for a dead one would hide it
    dist.barrier()  # one that leaves early cuts the others' connections
    gc.collect()  # a DDP model is a cycle that holds the group; left to the interpreter's end it aborts now and then
    dist.destroy_process_group()
