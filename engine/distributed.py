"""Several GPUs: torchrun starts one process for each, and every process runs train.py.

The base is frozen and replicated, so a step is: each rank takes its share of the step's examples, the gradients of the
adapter are summed over the ranks in one all-reduce, and every rank makes the same update. Nothing depends on how many
ranks there are but the order of a sum. Without torchrun the world is one process and no collective runs.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from external.terminal import print_any_letter

PATIENCE = timedelta(minutes=30)  # the slowest thing a rank waits for is another rank's loading


class World:
    """This process among those that torchrun started."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.main = rank == 0  # the one that writes and prints

    def add_up(self, parameters: list[nn.Parameter], run) -> None:
        """Sums the step's gradients and metrics over the ranks. A rank without examples adds zeros."""
        if self.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients])  # (all LoRA parameters,)
        dist.all_reduce(flat)
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = piece.view_as(p)  # (n,) -> p's shape
        own = (run.examples, {name: float(value) for name, value in run.sums.items()}, run.stopped)
        run.clear()
        for examples, part, stopped in self.gather(own):
            run.examples += examples
            run.stopped = run.stopped or stopped
            for name, value in part.items():
                run.sums[name] += value

    def gather(self, value) -> list:
        """`value` of every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def end_epoch(self, model: nn.Module, reference) -> None:
        """Shares the reference's log-probs and asserts that all ranks hold the same adapter."""
        if self.size == 1:
            return
        trained = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        sums = self.gather((float(trained.double().sum()), float(trained.double().square().sum())))
        assert len(set(sums)) == 1, f"the ranks' adapters differ: {sums}"
        if reference is not None:
            for known in self.gather(reference.state()):
                reference.load(known, trained.device)

    def any(self, here: bool) -> bool:
        """Whether something is so on any rank."""
        return any(self.gather(here))

    def agree_on(self, settings: dict) -> None:
        """SystemExit on every rank unless all have the same; each machine is started by hand, with files of its own."""
        given = self.gather(settings)
        differ = sorted(name for name, value in settings.items() if any(other[name] != value for other in given))
        if differ:
            raise SystemExit(f"the processes differ in {', '.join(differ)}: give all the same command and files")

    def agree(self, room):
        """The smallest micro-batch and the most recomputed layers that any rank needs, on all of them."""
        found = self.gather((room.size, room.decoder.checkpointed))
        room.size = min(size for size, _ in found)
        room.decoder.checkpointed = max(checkpointed for _, checkpointed in found)
        return room

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun, to each process


def under_torchrun() -> bool:
    """Whether torchrun started this process. SystemExit where only a part of what it tells is there."""
    if "RANK" not in os.environ:
        return False
    lacking = [name for name in TOLD if name not in os.environ]
    numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    wrong = [name for name in numbers if name not in lacking and not os.environ[name].isdigit()]
    if lacking or wrong:
        named = ", ".join(lacking + wrong)
        raise SystemExit(f"$RANK is set, but {named} is not as torchrun sets it: unset RANK, or start it by torchrun")
    return True


def join() -> World:
    """The world that torchrun's environment describes; ranks but the first print nothing."""
    print_any_letter()
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    if not under_torchrun():
        return World()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    world = World(dist.get_rank(), dist.get_world_size())
    if not world.main:
        sys.stdout = open(os.devnull, "w")
    return world


def leave() -> None:
    """Together: no rank takes its connections down while another still writes what the run leaves."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def share(lengths: Sequence[int], world: World) -> list[int]:
    """The indices of this rank's examples of a step, in their order: longest first to whoever has the fewest tokens."""
    taken: list[list[int]] = [[] for _ in range(world.size)]
    tokens = [0] * world.size
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = tokens.index(min(tokens))
        taken[least].append(index)
        tokens[least] += lengths[index]
    return sorted(taken[world.rank])
