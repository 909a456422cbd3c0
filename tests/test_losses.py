"""The objectives against arithmetic done by hand; every expected value is a literal."""

import math

import pytest
import torch

import losses
from losses import Logps

POLICY = Logps(torch.tensor([-10.0]), torch.tensor([-14.0]), torch.tensor([-11.0]))
REFERENCE = Logps(torch.tensor([-12.0]), torch.tensor([-13.0]), torch.tensor([-12.0]))


def objective(policy, reference, terms):
    """The sum of some terms per example, as the loop makes it."""
    return sum(losses.mdpo_terms(losses.rewards(policy, reference), terms=terms).values())


def close(value, expected, atol=5e-5):
    torch.testing.assert_close(value, torch.tensor(expected), atol=atol, rtol=0)


def test_worked_example():
    # rewards: .1 * (-10 + 12) = .2, .1 * (-14 + 13) = -.1, .1 * (-11 + 12) = .1
    r = losses.rewards(POLICY, REFERENCE, beta=0.1)
    close(torch.cat(r), [0.2, -0.1, 0.1])
    # -log sigma(x) = log(1 + e^-x): log(1 + e^-.3) = .5544, log(1 + e^-.1) = .6444, log(1 + e^-.2) = .5981
    close(losses.dpo_loss(r.chosen, r.rejected), [0.5544])
    close(losses.copo_loss(r.chosen, r.image_rejected), [0.6444])
    close(losses.ancpo_loss(r.chosen), [0.5981])
    close(losses.mdpo_loss(POLICY, REFERENCE), [1.7969])


def test_policy_equal_to_reference_gives_ln2_per_term():
    close(losses.mdpo_loss(POLICY, POLICY), [2.0794])  # 3 ln 2
    close(objective(POLICY, POLICY, ("dpo",)), [0.6931])  # ln 2


def test_delta_stands_outside_beta():
    # -log sigma(.2 - .5) = log(1 + e^.3) = .8544; inside beta it would be log(1 + e^-(.1 * (2 - .5))) = .6210
    close(losses.ancpo_loss(torch.tensor([0.2]), delta=0.5), [0.8544])
    close(losses.mdpo_loss(POLICY, REFERENCE, delta=0.5), [2.0531])  # .55436 + .64440 + .85436


@pytest.mark.parametrize(
    "terms, expected",
    [
        (("dpo",), 0.5544),  # DPO
        (("dpo", "ancpo"), 1.1525),  # -conditional: .5544 + .5981
        (("dpo", "copo"), 1.1988),  # -anchored: .5544 + .6444
        (("dpo", "copo", "ancpo"), 1.7969),  # mDPO
    ],
)
def test_ablations(terms, expected):
    close(objective(POLICY, REFERENCE, terms), [expected], atol=1e-4)


def test_anchors_in_the_opposite_direction():
    # y_l: -.1 below 0: -log sigma(0 + .1) = .6444; m_l: .1 below 0: -log sigma(0 - .1) = log(1 + e^.1) = .7444
    r = losses.rewards(POLICY, REFERENCE)
    close(losses.mdpo_terms(r, anchors=("l",))["ancpo"], [0.6444])
    close(losses.mdpo_terms(r, anchors=("m_l",))["ancpo"], [0.7444])
    close(losses.mdpo_terms(r, anchors=("w", "l", "m_l"))["ancpo"], [1.9869])  # .5981 + .6444 + .7444
    # with delta .5: -log sigma(.5 - .1) = log(1 + e^-.4) = .5130
    close(losses.mdpo_terms(r, delta=0.5, anchors=("m_l",))["ancpo"], [0.5130])


@pytest.mark.parametrize(
    "name, gradient",
    [
        # d/dx of -log sigma(x) at 0 is -1/2, times beta .1
        ("dpo", (-0.05, +0.05, 0.0)),
        ("copo", (-0.05, 0.0, +0.05)),
        ("ancpo", (-0.05, 0.0, 0.0)),
    ],
)
def test_gradient_signs(name, gradient):
    policy = Logps(*(torch.zeros(1, requires_grad=True) for _ in range(3)))
    reference = Logps(*(torch.zeros(1) for _ in range(3)))
    objective(policy, reference, (name,)).sum().backward()
    close(torch.stack([torch.zeros(1) if p.grad is None else p.grad for p in policy])[:, 0], list(gradient), 1e-6)


def test_dpo_needs_no_rejected_image():
    assert not losses.needs_image_rejected(("dpo",))
    assert not losses.needs_image_rejected(("dpo", "ancpo"), ("w", "l"))
    assert losses.needs_image_rejected(("dpo", "copo"))
    assert losses.needs_image_rejected(("ancpo",), ("m_l",))
    assert not losses.needs_image_rejected(("dpo",), ("m_l",))  # AncPO is off, so its anchors do not count
    two = losses.rewards(POLICY._replace(image_rejected=None), REFERENCE._replace(image_rejected=None))
    close(losses.mdpo_terms(two, terms=("dpo",))["dpo"], [0.5544])


# Three positions, two words. The row of logits at t scores the token at t + 1.
LOGITS = torch.log(torch.tensor([[[0.9, 0.1], [0.25, 0.75], [0.5, 0.5]]]))
IDS = torch.tensor([[0, 1, 1]])


def test_sequence_logps_is_a_sum_shifted_by_one():
    # response = tokens 1 and 2, scored by the rows 0 and 1: log .1 + log .75 = log .075 = -2.5903 (mean: -1.2951)
    close(losses.sequence_logps(LOGITS, IDS, torch.tensor([[False, True, True]])), [-2.5903])
    # response = token 2 alone, scored from the last prompt position, row 1: log .75 = -.2877 (unshifted: log .5)
    close(losses.sequence_logps(LOGITS, IDS, torch.tensor([[False, False, True]])), [-0.2877])


def test_sequence_logps_ignores_prompt_ids_outside_the_vocabulary():
    ids = torch.tensor([[-200, 1, 1]])  # an image placeholder
    close(losses.sequence_logps(LOGITS, ids, torch.tensor([[False, False, True]])), [-0.2877])


def test_sequence_logps_is_float32_from_bfloat16_logits():
    torch.manual_seed(0)
    logits = torch.randn(1, 65, 512).bfloat16()
    ids = torch.randint(512, (1, 65))
    mask = torch.ones(1, 65, dtype=torch.bool)
    logps = losses.sequence_logps(logits, ids, mask)
    assert logps.dtype == torch.float32
    exact = logits.double()[0, :-1].log_softmax(-1)[torch.arange(64), ids[0, 1:]].sum()
    assert abs(logps.item() - exact.item()) < 1e-3, (logps, exact)  # a bfloat16 sum of ~ -430 has a spacing of 2


def test_a_row_without_response_tokens_is_an_error():
    with pytest.raises(AssertionError, match="without response"):
        losses.sequence_logps(LOGITS, IDS, torch.zeros(1, 3, dtype=torch.bool))


def test_metrics_are_detached_and_name_every_triple():
    policy = Logps(*(p.clone().requires_grad_() for p in POLICY))
    r = losses.rewards(policy, REFERENCE)
    m = losses.metrics(policy, r, losses.mdpo_terms(r))
    assert not any(v.requires_grad for v in m.values())
    expected = {
        "losses/dpo": 0.5544,
        "losses/copo": 0.6444,
        "losses/ancpo": 0.5981,
        "rewards/margins": 0.3,
        "rewards/image_margins": 0.1,
        "rewards/accuracies": 1.0,
        "rewards/image_accuracies": 1.0,
        "logps/chosen": -10.0,
        "logps/rejected": -14.0,
        "logps/image_rejected": -11.0,
        "rewards/chosen": 0.2,
        "rewards/rejected": -0.1,
        "rewards/image_rejected": 0.1,
    }
    assert m.keys() == expected.keys()
    for key, value in expected.items():
        assert math.isclose(m[key].item(), value, abs_tol=5e-5), key


def test_equal_rewards_are_no_success():
    r = losses.rewards(POLICY, POLICY)  # all zero, as at the start of training
    m = losses.metrics(POLICY, r, losses.mdpo_terms(r))
    assert m["rewards/accuracies"].item() == 0.0 and m["rewards/image_accuracies"].item() == 0.0
