"""Does it look, or does it only say less? Three scores that silence cannot win, for any set of objects.

CHAIR falls when a model says less, so a table that shows it needs one of these beside it. They want to know who named
what where; toy.py counts that for its own objects.

Not from the papers. Deviations: none, the definitions are signal detection's and the ROC curve's.
"""

from statistics import NormalDist

import numpy as np


def d_prime(votes: np.ndarray, truth: np.ndarray, asked: np.ndarray, samples: int) -> float:
    """d' = z(hit rate) - z(false alarm rate): how well naming tells presence from absence; 0 is guessing.

    All are (scenes, objects). votes: how many of a scene's `samples` captions name the object; truth: is it there;
    asked: does it count. A rate is (named + .5) / (all + 1), so that none is 0 or 1.
    """
    there = asked & truth
    not_there = asked & ~truth
    hit_rate = (votes[there].sum() + 0.5) / (samples * there.sum() + 1)
    false_alarm_rate = (votes[not_there].sum() + 0.5) / (samples * not_there.sum() + 1)
    z = NormalDist().inv_cdf
    return z(float(hit_rate)) - z(float(false_alarm_rate))


def auc(present: list[float], absent: list[float]) -> float:
    """The chance that an object that is there has a higher score than one that is not; a tie counts half.

    It has no threshold: a model that names everything less often, by the same factor, keeps its value.
    """
    there = np.asarray(present)[:, None]  # (P, 1)
    not_there = np.asarray(absent)[None]  # (1, A)
    wins = (there > not_there) + 0.5 * (there == not_there)  # (P, A)
    return float(wins.mean())


def chair_i_at_coverage(coverage: float, votes: np.ndarray, truth: np.ndarray, samples: int) -> float:
    """CHAIR_i where a model says as much as any other: at this coverage, both as fractions.

    votes and truth as in d_prime. An object counts as said if at least t captions name it. t falls from all to 0, where
    everything is said and coverage is 1; between two values of t the line is straight. Where even the strictest t
    covers more than was asked, its CHAIR_i is the answer, an upper bound.
    """
    coverages = []
    chairs = []
    for t in range(samples, -1, -1):
        said = votes >= t  # (scenes, objects)
        coverages.append((said & truth).sum() / truth.sum())
        chairs.append((said & ~truth).sum() / max(1, said.sum()))
    return float(np.interp(coverage, coverages, chairs))
