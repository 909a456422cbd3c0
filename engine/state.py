"""A run's state on the disk. LoRA's weights, AdamW's moments and the step's number are nearly all there is.

The order of the data, m_l and LoRA's start are functions of (seed, row, epoch) and there is no dropout, so a run that
is stopped anywhere and resumed from here gives the same losses and the same adapter, on a CPU to the bit. What is kept
beside it saves work or keeps the splitting of a step as it was: the cached reference and the room for a micro-batch.

    checkpoint-000120/state.safetensors    lora.NAME, exp_avg.NAME, exp_avg_sq.NAME
    checkpoint-000120/state.json           step, sha256 of the former, room, reference

A checkpoint is written under another name, put on the disk and renamed: whole or not there.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.memory import Room
from external import files

MOMENTS = ("exp_avg", "exp_avg_sq")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; what a user calls checkpoint-best or checkpoint-2.old is none."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def write_checkpoint(folder: Path, step: int, model, optimizer, room: Room, reference) -> Path:
    """Writes checkpoint-STEP, the state after `step` optimiser steps, and drops all but the last two."""
    tensors = {}
    for name, p in trained_parameters(model).items():
        tensors[f"lora.{name}"] = p.detach().cpu().contiguous()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[p][moment].cpu().contiguous()
    target = folder / f"checkpoint-{step:06d}"
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it wrote
    part.mkdir()
    try:
        save_file(tensors, part / "state.safetensors")
        state = {
            "step": step,
            "sha256": files.file_sha256(part / "state.safetensors"),
            "room": {"size": room.size, "checkpointed": room.decoder.checkpointed},
            "reference": None if reference is None else reference.state(),
        }
        (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (part / "state.safetensors", part / "state.json", part):
            put_on_disk(path)
        shutil.rmtree(target, ignore_errors=True)  # of a run that was resumed from an older one
        os.rename(part, target)
        put_on_disk(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)
    return target


def read_newest(folder: Path, model, optimizer, room: Room | None, reference) -> int:
    """Takes over the newest whole checkpoint and returns its step, 0 where there is none; names the damaged ones.

    room None: steps are split anew, by other flags than before.
    """
    for checkpoint in reversed(checkpoints(folder)):
        try:
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            found = files.file_sha256(checkpoint / "state.safetensors")
            damage = None if found == state["sha256"] else "state.safetensors is not what was written"
        except (OSError, ValueError, KeyError, TypeError) as e:
            damage = f"{type(e).__name__}: {e}"
        if damage is None:
            take_over(load_file(checkpoint / "state.safetensors"), state, model, optimizer, room, reference)
            return state["step"]
        print(f"{checkpoint}: damaged ({damage}); the one before it is taken")
    return 0


def take_over(tensors: dict, state: dict, model, optimizer, room: Room | None, reference) -> None:
    parameters = trained_parameters(model)
    moments = {}
    with torch.no_grad():
        for i, (name, p) in enumerate(parameters.items()):
            p.copy_(tensors[f"lora.{name}"])
            moments[i] = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
            moments[i]["step"] = torch.tensor(float(state["step"]))
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if room is not None:
        room.size = state["room"]["size"]
        room.decoder.checkpointed = state["room"]["checkpointed"]
    if reference is not None:
        reference.load(state["reference"], next(iter(parameters.values())).device)


def put_on_disk(path: Path) -> None:
    """fsync of a file or folder; Windows has none for folders, and wants a file to be open for writing."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
