"""The objectives of the two papers, written in rewards: one line per term, one example by hand.

mDPO (Wang et al. 2024): L_mDPO = L_DPO + L_CoPO + L_AncPO, sections 2.1, 3.1 and 3.2.
PDS-DPO (Wijaya et al. 2024): L_DPO alone.

Names: (m_w, q, y_w) is `chosen`, (m_w, q, y_l) is `rejected`, (m_l, q, y_w) is `image_rejected`. Every log-prob is a
float32 *sum* over the response tokens, EOS included. A reward is r = beta * (log pi_theta - log pi_ref).

Deviations from the papers
1. The papers write the anchor for (m_w, q, y_w) only and describe the others in words (mDPO 3.2, Table 4). Here an
   anchor on (m_w, q, y_l) or (m_l, q, y_w) is -log sigma(delta - r), "keep the reward below delta", same delta.
2. The released mDPO code has no delta; the paper's default is 0, which is the same thing.

Worked example, beta 0.1, delta 0
    policy    (chosen, rejected, image_rejected) = (-10, -14, -11)
    reference (chosen, rejected, image_rejected) = (-12, -13, -12)
    rewards 0.2, -0.1, 0.1
    L_DPO = -log sigma(0.3) = 0.5544, L_CoPO = -log sigma(0.1) = 0.6444, L_AncPO = -log sigma(0.2) = 0.5981
    L_mDPO = 1.7969
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

TERMS = ("dpo", "copo", "ancpo")
ANCHORS = ("w", "l", "m_l")  # (m_w, q, y_w) above delta; (m_w, q, y_l) and (m_l, q, y_w) below it


class Logps(NamedTuple):
    """Summed response log-probs in nats, each (B,) float32; image_rejected is None where no m_l is used."""

    chosen: Tensor  # log pi(y_w | m_w, q)
    rejected: Tensor  # log pi(y_l | m_w, q)
    image_rejected: Tensor | None = None  # log pi(y_w | m_l, q)


def sequence_logps(logits: Tensor, input_ids: Tensor, response_mask: Tensor) -> Tensor:
    """log pi(y | m, q) = sum over the response tokens y_t, EOS included, of log pi(y_t | m, q, y_<t): (B,) float32.

    logits (B, T, V), input_ids (B, T), response_mask (B, T) bool, True on response tokens. The logits at position t
    predict token t + 1, so the first response token is scored from the last position of the prompt.
    """
    assert response_mask[:, 1:].any(1).all(), f"a row without response tokens: {response_mask.sum(1).tolist()}"
    targets = input_ids.masked_fill(~response_mask, 0)[:, 1:]  # (B, T-1); image placeholders need not be in V
    logps = F.log_softmax(logits[:, :-1].float(), dim=-1)  # (B, T-1, V)
    token_logps = logps.gather(-1, targets[..., None]).squeeze(-1)  # (B, T-1, 1) -> (B, T-1)
    return (token_logps * response_mask[:, 1:]).sum(1)  # (B, T-1) -> (B,)


def plain_logps(model, batch) -> Logps:
    """Scores one batch in two or three full forward passes: the path that defines what is right.

    `batch` is a data.Batch. Policy and reference both go through here: with the adapter on this is the policy, inside
    `lora.lora_disabled(model)` the reference.
    """
    w, l = batch.chosen, batch.rejected
    chosen = sequence_logps(model(w.input_ids, batch.images), w.input_ids, w.response_mask)
    rejected = sequence_logps(model(l.input_ids, batch.images), l.input_ids, l.response_mask)
    if batch.image_rejected is None:  # neither L_CoPO nor an anchor on m_l is in the objective
        return Logps(chosen, rejected)
    image_rejected = sequence_logps(model(w.input_ids, batch.image_rejected), w.input_ids, w.response_mask)
    return Logps(chosen, rejected, image_rejected)


def rewards(policy: Logps, reference: Logps, beta: float = 0.1) -> Logps:
    """r(m, q, y) = beta * (log pi_theta(y | m, q) - log pi_ref(y | m, q)) of each triple, (B,) (mDPO 2.1)."""
    return Logps(*(None if p is None else beta * (p - r) for p, r in zip(policy, reference, strict=True)))


def dpo_loss(r_chosen: Tensor, r_rejected: Tensor) -> Tensor:
    """L_DPO_m = -log sigma(r(m_w, q, y_w) - r(m_w, q, y_l)): which answer. (B,) (mDPO 2.1)."""
    return -F.logsigmoid(r_chosen - r_rejected)


def copo_loss(r_chosen: Tensor, r_image_rejected: Tensor) -> Tensor:
    """L_CoPO = -log sigma(r(m_w, q, y_w) - r(m_l, q, y_w)): which image. (B,) (mDPO 3.1)."""
    return -F.logsigmoid(r_chosen - r_image_rejected)


def ancpo_loss(reward: Tensor, delta: float = 0.0, above: bool = True) -> Tensor:
    """L_AncPO = -log sigma(r(m_w, q, y_w) - delta): stay above the anchor; above=False: below it. (B,) (mDPO 3.2)."""
    return -F.logsigmoid(reward - delta if above else delta - reward)


def mdpo_terms(r: Logps, delta: float = 0.0, terms=TERMS, anchors=("w",)) -> dict[str, Tensor]:
    """The terms that are switched on, each (B,), from the rewards `r`; their sum is L_mDPO.

    terms: all of TERMS is mDPO; without "copo" it is the paper's "-conditional", without "ancpo" "-anchored", "dpo"
    alone is DPO (Table 2). anchors: which triples "ancpo" holds (Table 4).
    """
    losses = {}
    if "dpo" in terms:
        losses["dpo"] = dpo_loss(r.chosen, r.rejected)
    if "copo" in terms:
        losses["copo"] = copo_loss(r.chosen, r.image_rejected)
    if "ancpo" in terms:
        held = {"w": (r.chosen, True), "l": (r.rejected, False), "m_l": (r.image_rejected, False)}
        losses["ancpo"] = sum(ancpo_loss(held[a][0], delta, above=held[a][1]) for a in anchors)
    return losses


def mdpo_loss(policy: Logps, reference: Logps, beta=0.1, delta=0.0, terms=TERMS, anchors=("w",)) -> Tensor:
    """L_mDPO = L_DPO_m + L_CoPO + L_AncPO per example, (B,) (mDPO section 3); average it over examples."""
    return sum(mdpo_terms(rewards(policy, reference, beta), delta, terms, anchors).values())


def needs_image_rejected(terms=TERMS, anchors=("w",)) -> bool:
    """Whether the objective looks at m_l at all; if not, none is drawn, prepared or scored."""
    return "copo" in terms or ("ancpo" in terms and "m_l" in anchors)


def metrics(policy: Logps, r: Logps, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the log shows, each (B,) and detached: mean over examples later. Keys are explained in docs/metrics.md."""
    out = {f"losses/{name}": value for name, value in losses.items()}
    out |= {"rewards/chosen": r.chosen, "rewards/rejected": r.rejected, "rewards/margins": r.chosen - r.rejected}
    out |= {"rewards/accuracies": (r.chosen > r.rejected).float()}
    out |= {"logps/chosen": policy.chosen, "logps/rejected": policy.rejected}
    if r.image_rejected is not None:
        out |= {"rewards/image_rejected": r.image_rejected, "logps/image_rejected": policy.image_rejected}
        out |= {"rewards/image_margins": r.chosen - r.image_rejected}
        out |= {"rewards/image_accuracies": (r.chosen > r.image_rejected).float()}
    return {key: value.detach() for key, value in out.items()}
