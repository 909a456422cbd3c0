"""log pi_ref scored once and looked up after. Equals `train.live_reference` with `packed_logps`; read that first.

The reference never changes, so (m_w, q, y_w) and (m_w, q, y_l) are scored once per row of the data, (m_l, q, y_w) once
per draw of m_l: every epoch, or once with --no-crop-every-epoch. The first time a row is met it is scored with the
adapter off on the same packed row and by the same kernels as the policy. LoRA's B starts at zero, so both are equal to
the bit and the first loss is 3 ln 2, in bfloat16 too.

The numbers belong to one run. They are saved with its checkpoints and no other run reads them.
"""

from collections.abc import Callable

import torch

from engine.packing import Packed, pack, packed_logps
from lora import lora_disabled
from losses import Logps


class CachedReference:
    """`reference(model, packed)` -> Logps, (B,) float32 each, on the model's device."""

    def __init__(self, any_rank: Callable[[bool], bool] = bool):
        """any_rank(x): whether x is so on any rank. With a sharded base all ranks score when one has to."""
        self.any_rank = any_rank
        self.text: dict[int, tuple[float, float]] = {}  # row: log-probs of chosen and rejected
        self.image: dict[tuple[int, int], float] = {}  # row and draw of m_l: log-prob of image_rejected

    @torch.no_grad()
    def __call__(self, model, packed: Packed) -> Logps:
        """Looks the examples' log-probs up; what is not known is scored with the adapter off and kept."""
        device = model.lm_head.weight.device
        rows = [e.pair.row for e in packed.examples]
        draws = [(e.pair.row, e.draw) for e in packed.examples]
        with_image = "image_rejected" in packed.which
        new_text = self.any_rank(any(row not in self.text for row in rows))
        new_image = self.any_rank(with_image and any(draw not in self.image for draw in draws))
        if new_text or new_image:
            if not new_text:  # a new m_l under known texts: its group alone
                alone = pack(packed.examples, which=("image_rejected",)).to(device)
                packed = alone._replace(pictures=packed.pictures.every_second(model))
            with lora_disabled(model):
                scored = packed_logps(model, packed)
            if new_text:
                texts = zip(scored.chosen.tolist(), scored.rejected.tolist(), strict=True)
                self.text.update(zip(rows, texts, strict=True))
            if with_image:
                self.image.update(zip(draws, scored.image_rejected.tolist(), strict=True))
        chosen = torch.tensor([self.text[row][0] for row in rows], device=device)  # (B,)
        rejected = torch.tensor([self.text[row][1] for row in rows], device=device)  # (B,)
        if not with_image:
            return Logps(chosen, rejected)
        return Logps(chosen, rejected, torch.tensor([self.image[draw] for draw in draws], device=device))

    def state(self) -> dict:
        """What is known, as JSON; floats are written so that they are read back to the bit."""
        text = [[row, chosen, rejected] for row, (chosen, rejected) in self.text.items()]
        image = [[row, draw, logp] for (row, draw), logp in self.image.items()]
        return {"text": text, "image": image}

    def load(self, state: dict) -> None:
        self.text.update({row: (chosen, rejected) for row, chosen, rejected in state["text"]})
        self.image.update({(row, draw): logp for row, draw, logp in state["image"]})
