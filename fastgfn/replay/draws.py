"""In which order stored entries are drawn: a priority, without replacement."""

import math

import numpy as np

PRIORITIES = ("reward", "uniform", "recency", "mix")


def draw_order(
    priority: str,
    log_reward: np.ndarray,
    age: np.ndarray,
    rng: np.random.Generator,
    *,
    half_life: float,
    recency_share: float,
) -> np.ndarray:
    """All n entries in the order of draws without replacement (Gumbel top-k: the next one is drawn in
    proportion to its weight among those left).

    "reward" weighs by R, "uniform" equally, "recency" by 2^(-age / half_life), with half_life 0 the newest
    first. "mix" takes from the order of "recency" at a share `recency_share` of the places and from that of
    "reward" at the others, spread evenly with a random start: every place has that probability, and of k
    draws the share is met to within one.

    Args:
        log_reward: (n,) tempered log R.
        age: (n,) how many entries are newer.
    """
    n = len(log_reward)
    if priority == "mix":
        by_reward, by_recency = (
            draw_order(name, log_reward, age, rng, half_life=half_life, recency_share=recency_share)
            for name in ("reward", "recency")
        )
        ticks = np.floor(np.arange(n + 1) * recency_share + rng.random())
        return _merged(by_recency, by_reward, np.diff(ticks) > 0)
    if priority == "recency" and half_life == 0:
        return np.argsort(age, kind="stable")
    score = rng.gumbel(size=n)
    if priority == "reward":
        score = score + log_reward
    elif priority == "recency":
        score = score - age * (math.log(2.0) / half_life)
    return np.argsort(-score, kind="stable")


def _merged(first: np.ndarray, second: np.ndarray, takes_first: np.ndarray) -> np.ndarray:
    """Every entry once: at each place the next one of the order that the place takes from."""
    orders, used, order = (iter(first.tolist()), iter(second.tolist())), set(), []
    for is_first in takes_first.tolist():
        order.append(next(i for i in orders[0 if is_first else 1] if i not in used))
        used.add(order[-1])
    return np.array(order, dtype=np.int64)
