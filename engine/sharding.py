"""A base that does not fit one GPU: its frozen layers are sharded over the ranks (FSDP2), the adapter is not.

Equals the replicated base to the last bit but for the order of sums; tests/test_engine_distributed.py says so. A layer
is gathered when a forward or backward pass reaches it and given back after. That is a collective, so every rank has to
run the same number of passes: a rank with fewer micro-batches than another runs idle ones, whose gradients are zero.
"""

import os
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from data import Example
from engine.distributed import World
from engine.memory import Room


def shard(path, model: nn.Module, room: Room, world: World, spare: Example) -> "ShardedRoom":
    """Shards the decoder layers of a model that has its adapter, moves the rest to the rank's device.

    `path` is a train.ScoringPath, `spare` any example, for idle passes.
    """
    for layer in model.language_model.layers:
        adapter = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, ignored_params=adapter)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    model.to(device)

    def idle() -> None:
        batch = path.make_batch([spare]).to(device)
        with path.autocast:
            path.reference(model, batch)
            policy = path.score(model, batch)
            total = sum(logps.sum() for logps in policy if logps is not None)
        (0 * total).backward()

    return ShardedRoom(room, world, idle)


class ShardedRoom(Room):
    """The same number of micro-batches on every rank. Out of memory ends the run: the other ranks cannot repeat."""

    def __init__(self, room: Room, world: World, idle: Callable[[], None]):
        super().__init__(room.decoder, room.parameters, room.split, room.size)
        self.world, self.idle = world, idle

    def micro_batches(self, examples: list[Example], clear: Callable[[], None]) -> Iterator[list[Example]]:
        clear()
        own = self.split(examples, self.size)
        most = max(self.world.gather(len(own)))
        yield from own
        for _ in range(most - len(own)):
            self.idle()

    def __exit__(self, kind, error, trace) -> bool:
        if kind is None or not issubclass(kind, torch.OutOfMemoryError):
            return False
        raise SystemExit(
            "out of memory with a sharded base: resume with --checkpointing full, or a smaller --tokens-per-batch"
        ) from None
