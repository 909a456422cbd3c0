"""The objectives of the two papers, one line per term.

mDPO (Wang et al. 2024): L_mDPO = L_DPO + L_CoPO + L_AncPO, sections 2.1, 3.1 and 3.2.
PDS-DPO (Wijaya et al. 2024): L_DPO alone.

Three triples of picture, question and answer are scored:
    chosen          (m_w, q, y_w)    the right picture, the good answer
    rejected        (m_w, q, y_l)    the right picture, the bad answer
    image_rejected  (m_l, q, y_w)    a poor picture, the good answer
Log-probs are in nats: float32 *sums* over the response tokens, EOS included. Everything here is per example, (B,).

Deviations from the papers
1. The papers write the anchor for (m_w, q, y_w) only and describe the others in words (mDPO 3.2, Table 4). Here an
   anchor on (m_w, q, y_l) or (m_l, q, y_w) is -log sigma(delta - r), "keep the reward below delta", same delta.
2. The released mDPO code has no delta; the paper's default is 0, which is the same thing.
3. The paper's r has a term Z(q) (mDPO 2.1). It cancels in L_DPO and L_CoPO, and L_AncPO is written without it.

Worked example, beta 0.1, delta 0
                 chosen  rejected  image_rejected
    policy          -10       -14             -11
    reference       -12       -13             -12
    reward          0.2      -0.1             0.1
    L_DPO   = -log sigma(0.2 + 0.1) = 0.5544
    L_CoPO  = -log sigma(0.2 - 0.1) = 0.6444
    L_AncPO = -log sigma(0.2 - 0)   = 0.5981
    L_mDPO                          = 1.7969
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Logps(NamedTuple):
    """Summed response log-probs of one model in nats, each (B,) float32."""

    chosen: Tensor  # log pi(y_w | m_w, q)
    rejected: Tensor  # log pi(y_l | m_w, q)
    image_rejected: Tensor | None = None  # log pi(y_w | m_l, q); None where the objective does not look at m_l


class Rewards(NamedTuple):
    """r(m, q, y) = beta (log pi_theta(y | m, q) - log pi_ref(y | m, q)), each (B,) float32 (mDPO 2.1)."""

    chosen: Tensor  # r(m_w, q, y_w)
    rejected: Tensor  # r(m_w, q, y_l)
    image_rejected: Tensor | None = None  # r(m_l, q, y_w)


# ---- the objective -------------------------------------------------------------------------------------------------


def mdpo_loss(policy: Logps, reference: Logps, beta: float = 0.1, delta: float = 0.0) -> Tensor:
    """L_mDPO per example, (B,); average it over the examples of a step (mDPO 3)."""
    r = rewards(policy, reference, beta)
    l_dpo = dpo_loss(r.chosen, r.rejected)
    l_copo = copo_loss(r.chosen, r.image_rejected)
    l_ancpo = ancpo_loss(r.chosen, delta)
    return l_dpo + l_copo + l_ancpo


def rewards(policy: Logps, reference: Logps, beta: float = 0.1) -> Rewards:
    """How much more likely than the reference the policy finds each triple, times beta (mDPO 2.1)."""
    chosen = beta * (policy.chosen - reference.chosen)  # r(m_w, q, y_w)
    rejected = beta * (policy.rejected - reference.rejected)  # r(m_w, q, y_l)
    if policy.image_rejected is None:
        return Rewards(chosen, rejected)
    image_rejected = beta * (policy.image_rejected - reference.image_rejected)  # r(m_l, q, y_w)
    return Rewards(chosen, rejected, image_rejected)


def dpo_loss(r_chosen: Tensor, r_rejected: Tensor) -> Tensor:
    """L_DPO = -log sigma(r(m_w, q, y_w) - r(m_w, q, y_l)): which answer. (B,) (mDPO 2.1)."""
    return -F.logsigmoid(r_chosen - r_rejected)


def copo_loss(r_chosen: Tensor, r_image_rejected: Tensor) -> Tensor:
    """L_CoPO = -log sigma(r(m_w, q, y_w) - r(m_l, q, y_w)): which image. (B,) (mDPO 3.1)."""
    return -F.logsigmoid(r_chosen - r_image_rejected)


def ancpo_loss(r_chosen: Tensor, delta: float = 0.0) -> Tensor:
    """L_AncPO = -log sigma(r(m_w, q, y_w) - delta): stay above the anchor. (B,) (mDPO 3.2)."""
    return -F.logsigmoid(r_chosen - delta)


# ---- log-probs -----------------------------------------------------------------------------------------------------


def sequence_logps(logits: Tensor, input_ids: Tensor, response_mask: Tensor) -> Tensor:
    """log pi(y | m, q) = sum over the response tokens y_t, EOS included, of log pi(y_t | m, q, y_<t): (B,) float32.

    logits (B, T, V), input_ids (B, T), response_mask (B, T) bool, True on response tokens. The logits at position t
    predict token t + 1, so the first response token is scored from the last position of the prompt.
    """
    scored = response_mask[:, 1:]  # (B, T-1)
    assert scored.any(1).all(), f"a row without response tokens: {response_mask.sum(1).tolist()}"
    targets = input_ids[:, 1:].masked_fill(~scored, 0)  # (B, T-1); the prompt's <image> id need not be in V
    logps = F.log_softmax(logits[:, :-1].float(), dim=-1)  # (B, T-1, V)
    token_logps = logps.gather(-1, targets[..., None]).squeeze(-1)  # (B, T-1, 1) -> (B, T-1)
    return (token_logps * scored).sum(1)  # (B, T-1) -> (B,)


def plain_logps(model, batch) -> Logps:
    """Scores a data.Batch in two or three full forward passes: the path that defines what is right.

    With the adapter on this is the policy, inside `lora.lora_disabled(model)` it is the reference.
    """
    w, l = batch.chosen, batch.rejected
    chosen = sequence_logps(model(w.input_ids, batch.images), w.input_ids, w.response_mask)
    rejected = sequence_logps(model(l.input_ids, batch.images), l.input_ids, l.response_mask)
    if batch.image_rejected is None:
        return Logps(chosen, rejected)
    image_rejected = sequence_logps(model(w.input_ids, batch.image_rejected), w.input_ids, w.response_mask)
    return Logps(chosen, rejected, image_rejected)


# ---- the ablations: terms of Table 2, anchors of Table 4 -----------------------------------------------------------

TERMS = ("dpo", "copo", "ancpo")  # without copo: the paper's "-conditional"; without ancpo: "-anchored"
ANCHORS = ("w", "l", "m_l")  # (m_w, q, y_w) held above delta; (m_w, q, y_l) and (m_l, q, y_w) held below it


def mdpo_terms(r: Rewards, delta: float = 0.0, terms=TERMS, anchors=("w",)) -> dict[str, Tensor]:
    """The terms that are switched on, each (B,); with the defaults their sum is `mdpo_loss`."""
    losses = {}
    if "dpo" in terms:
        losses["dpo"] = dpo_loss(r.chosen, r.rejected)
    if "copo" in terms:
        losses["copo"] = copo_loss(r.chosen, r.image_rejected)
    if "ancpo" in terms:
        losses["ancpo"] = anchor_losses(r, delta, anchors)
    return losses


def anchor_losses(r: Rewards, delta: float, anchors) -> Tensor:
    """The sum of the anchors that are switched on, (B,) (Table 4)."""
    total = r.chosen.new_zeros(r.chosen.shape)  # (B,)
    if "w" in anchors:
        total = total + ancpo_loss(r.chosen, delta)
    if "l" in anchors:
        total = total + ancpo_below_loss(r.rejected, delta)
    if "m_l" in anchors:
        total = total + ancpo_below_loss(r.image_rejected, delta)
    return total


def ancpo_below_loss(reward: Tensor, delta: float = 0.0) -> Tensor:
    """-log sigma(delta - r): stay below the anchor, for the two triples that are not to be preferred. (B,)."""
    return -F.logsigmoid(delta - reward)


def needs_image_rejected(terms=TERMS, anchors=("w",)) -> bool:
    """Whether the objective looks at m_l at all; if not, none is drawn, prepared or scored."""
    return "copo" in terms or ("ancpo" in terms and "m_l" in anchors)


# ---- what the log shows --------------------------------------------------------------------------------------------


def metrics(policy: Logps, r: Rewards, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each (B,) and detached, averaged over examples later. docs/metrics.md explains the keys."""
    shown = {f"losses/{name}": loss for name, loss in terms.items()}
    shown["rewards/chosen"] = r.chosen
    shown["rewards/rejected"] = r.rejected
    shown["rewards/margins"] = r.chosen - r.rejected
    shown["rewards/accuracies"] = (r.chosen > r.rejected).float()
    shown["logps/chosen"] = policy.chosen
    shown["logps/rejected"] = policy.rejected
    if r.image_rejected is not None:
        shown["rewards/image_rejected"] = r.image_rejected
        shown["rewards/image_margins"] = r.chosen - r.image_rejected
        shown["rewards/image_accuracies"] = (r.chosen > r.image_rejected).float()
        shown["logps/image_rejected"] = policy.image_rejected
    return {key: value.detach() for key, value in shown.items()}
