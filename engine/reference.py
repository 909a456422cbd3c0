"""log pi_ref scored once and kept."""

import hashlib
import json
from pathlib import Path

import torch

from data import Example, Pair, PairData
from engine.packing import pack, packed_logps
from external import files
from lora import lora_disabled
from losses import Logps

# ---- the reference, scored once ------------------------------------------------------------------------------------
#
# The reference never changes, so log pi_ref is computed once per row and looked up after. The first time a row is met
# it is scored with the adapter off on the same packed row, by the same function and kernels as the policy: since LoRA's
# B starts at zero both are equal to the bit and the first loss is 3 ln 2, in bfloat16 too. Afterwards (m_w, q, y_w) and
# (m_w, q, y_l) come from the cache; (m_l, q, y_w) is scored once per draw of m_l: every epoch, or once with
# --no-crop-every-epoch. Other epochs pack rows differently, which rounds differently in bfloat16: `check_drift`
# measures it before epoch 2. The file (JSON) has a key of everything the numbers depend on; a stale key is scored anew
# and the field is named. Rows are looked up by a hash of texts and pictures: edited data never meets old numbers.

DRIFT_ROWS, DRIFT_MEAN, DRIFT_RMS = 64, 0.002, 0.03  # bounds in reward units, to be recalibrated on real weights


def row_digest(pair: Pair) -> str:
    h = hashlib.sha256(json.dumps([pair.prompt, pair.chosen, pair.rejected]).encode())
    for image in (pair.image, pair.image_rejected):
        if isinstance(image, Path):
            stat = image.stat()
            image = f"{image} {stat.st_size} {stat.st_mtime_ns}".encode()
        h.update(image or b"-")
    return h.hexdigest()[:24]


def base_digest(model) -> str:
    """A hash of the bits of every frozen weight."""
    h = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad:
            name = name.replace(".base.", ".")
            h.update(f"{name} {tuple(p.shape)} {int(torch.hash_tensor(p).view(torch.int64))}".encode())
    return h.hexdigest()[:24]


class ReferenceCache:
    """log pi_ref by row; `reference(model, examples, epoch)` -> Logps (B,) float32 on the model's device."""

    def __init__(self, file: Path | None, key: dict[str, str], data: PairData):
        self.file, self.key, self.fresh = file, key, data.fresh_every_epoch
        self.digests = {pair.row: row_digest(pair) for pair in data.pairs}
        self.text: dict[str, list[float]] = {}  # digest: [chosen, rejected]
        self.image: dict[str, float] = {}  # digest/draw: image_rejected
        if file and file.is_file():
            self.load()

    def load(self) -> None:
        stored = json.loads(self.file.read_text())
        changed = sorted(k for k in self.key.keys() | stored["key"].keys() if self.key.get(k) != stored["key"].get(k))
        if changed:
            print(f"reference: {self.file} is for another {', '.join(changed)}; scored anew")
            return
        self.text, self.image = stored["text"], stored["image"]
        known = sum(d in self.text for d in self.digests.values())
        print(f"reference: {known} of {len(self.digests)} rows known from {self.file}")

    def save(self) -> None:
        if self.file:
            files.write_json(self.file, {"key": self.key, "text": self.text, "image": self.image})

    def draw(self, example: Example, epoch: int) -> str:
        return f"{self.digests[example.pair.row]}/{epoch if self.fresh else 0}"

    @torch.no_grad()
    def reference(self, model, batch, examples: list[Example], epoch: int) -> Logps:
        """Looks the examples' log-probs up; scores what is not known, with the adapter off, and keeps it."""
        texts = [self.digests[e.pair.row] for e in examples]
        draws = [self.draw(e, epoch) for e in examples]
        with_image = examples[0].image_rejected is not None
        unknown_text = any(d not in self.text for d in texts)
        if unknown_text or (with_image and any(d not in self.image for d in draws)):
            if not unknown_text:  # a new m_l under known texts: its group alone
                batch = pack(examples, which=("image_rejected",)).to(model.lm_head.weight.device)
            with lora_disabled(model):
                scored = packed_logps(model, batch)
            if unknown_text:
                pairs = torch.stack([scored.chosen, scored.rejected], dim=1).tolist()  # (B, 2)
                self.text.update(zip(texts, pairs, strict=True))
            if with_image:
                self.image.update(zip(draws, scored.image_rejected.tolist(), strict=True))
        device = model.lm_head.weight.device
        chosen, rejected = torch.tensor([self.text[d] for d in texts], device=device).T  # (B, 2) -> (B,), (B,)
        image_rejected = torch.tensor([self.image[d] for d in draws], device=device) if with_image else None
        return Logps(chosen, rejected, image_rejected)

    @torch.no_grad()
    def check_drift(self, model, micro_batches: list[list[Example]], beta: float) -> None:
        """Scores cached rows again in a new packing; SystemExit if e = beta * (new - cached) is not rounding noise."""
        differences = []
        for examples in micro_batches:
            with lora_disabled(model):
                scored = packed_logps(model, pack(examples).to(model.lm_head.weight.device))
            for i, e in enumerate(examples):
                cached = self.text[self.digests[e.pair.row]]
                differences += [float(scored.chosen[i]) - cached[0], float(scored.rejected[i]) - cached[1]]
        e = beta * torch.tensor(differences)
        mean, rms, standard_error = float(e.mean()), float(e.pow(2).mean().sqrt()), float(e.std() / len(e) ** 0.5)
        print(f"reference: {len(e)} cached log-probs scored again: beta * difference has mean {mean:+.2e}, "
              f"RMS {rms:.2e}, max {float(e.abs().max()):.2e}")  # fmt: skip
        if abs(mean) > DRIFT_MEAN + 3 * standard_error or rms > DRIFT_RMS:
            raise SystemExit(
                f"reference: cached log-probs do not repeat (bounds: mean {DRIFT_MEAN} + 3 standard errors, RMS "
                f"{DRIFT_RMS}). Train with --reference live, and report base, GPU and torch version."
            )
