"""log pi_ref scored once and looked up after. Equals `train.live_reference` with `packed_logps`; read that first.

The reference never changes, so (m_w, q, y_w) and (m_w, q, y_l) are scored once per row of the data, (m_l, q, y_w) once
per draw of m_l: every epoch, or once with --no-crop-every-epoch. The first time a row is met it is scored with the
adapter off on the same packed row and by the same kernels as the policy. LoRA's B starts at zero, so both are equal to
the bit and the first loss is 3 ln 2, in bfloat16 too.

The numbers belong to one run. They are saved with its checkpoints and no other run reads them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.packing import Packed, pack, packed_logps
from lora import lora_disabled
from losses import Logps


class CachedReference:
    """`reference(model, packed)` -> Logps, (B,) float32 each, on the model's device."""

    def __init__(self, any_rank: Callable[[bool], bool] = bool):
        """any_rank(x): whether x is so on any rank. With a sharded base all ranks score when one has to."""
        self.any_rank = any_rank
        # kept where they were computed: to read a number on the host is to wait for all that the GPU still has to do
        self.text: dict[int, Tensor] = {}  # row: (2,) log-probs of chosen and rejected
        self.image: dict[tuple[int, int], Tensor] = {}  # row and draw of m_l: () log-prob of image_rejected

    @torch.no_grad()
    def __call__(self, model, packed: Packed) -> Logps:
        """Looks the examples' log-probs up; what is not known is scored with the adapter off and kept."""
        rows = [e.pair.row for e in packed.examples]
        draws = [(e.pair.row, e.draw) for e in packed.examples]
        with_image = "image_rejected" in packed.which
        new_text = self.any_rank(any(row not in self.text for row in rows))
        new_image = self.any_rank(with_image and any(draw not in self.image for draw in draws))
        if new_text or new_image:
            if not new_text:  # a new m_l under known texts: its group alone
                alone = pack(packed.examples, which=("image_rejected",))
                alone = alone._replace(pictures=packed.pictures.every_second(model))  # there already
                packed = alone.to(packed.input_ids.device)
            with lora_disabled(model):
                scored = packed_logps(model, packed)
            if new_text:
                texts = torch.stack([scored.chosen, scored.rejected], dim=1)  # (B, 2)
                self.text.update(zip(rows, texts, strict=True))
            if with_image:
                self.image.update(zip(draws, scored.image_rejected, strict=True))
        chosen, rejected = torch.stack([self.text[row] for row in rows]).unbind(1)  # (B, 2) -> (B,) both
        if not with_image:
            return Logps(chosen, rejected)
        return Logps(chosen, rejected, torch.stack([self.image[draw] for draw in draws]))

    def state(self) -> dict:
        """What is known, as JSON; floats are written so that they are read back to the bit."""
        text = [[row, *logps] for row, logps in zip(self.text, read(self.text), strict=True)]
        image = [[*draw, logp] for draw, logp in zip(self.image, read(self.image), strict=True)]
        return {"text": text, "image": image}

    def load(self, state: dict, device: torch.device) -> None:
        """What `state` says is known from now on; `device` is the model's."""
        texts = torch.tensor([logps for _, *logps in state["text"]], device=device)  # (rows, 2)
        images = torch.tensor([logp for *_, logp in state["image"]], device=device)  # (draws,)
        self.text.update(zip([row for row, *_ in state["text"]], texts, strict=True))
        self.image.update(zip([(row, draw) for row, draw, _ in state["image"]], images, strict=True))


def read(known: dict[Any, Tensor]) -> list:
    """All numbers of a table, in its order, with one wait for the device."""
    return torch.stack(list(known.values())).tolist() if known else []
