"""One rule for all that chooses a threshold from clean images alone."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from backdoor_gym.arguments import is_finite
from backdoor_gym.errors import DataError
from backdoor_gym.wording import shown

AUTO = "auto"
#: All that the accuracy budget of the environment allows.
BUDGET = "budget"
Threshold = float | Literal["auto", "budget"]


def check_threshold(threshold: Any) -> None:
    """Raise ``DataError`` unless it is a finite number, "auto" or "budget"."""
    if isinstance(threshold, str) and threshold in (AUTO, BUDGET):
        return
    if not is_finite(threshold):
        raise DataError(f'a threshold must be a number, "{AUTO}" or "{BUDGET}", not {shown(threshold)}')


def parse_threshold(text: str) -> Threshold:
    """A threshold from text.

    Raises:
        DataError: it is none.
    """
    threshold: Any = text
    if text not in (AUTO, BUDGET):
        try:
            threshold = float(text)
        except ValueError:
            raise DataError(f'a threshold must be a number, "{AUTO}" or "{BUDGET}", not {text!r}') from None
    check_threshold(threshold)
    return threshold


def choose_threshold(
    scores: np.ndarray, clean_accuracy: Callable[[np.ndarray], float], accuracy_budget: float
) -> float:
    """The lowest threshold above which all may be pruned within the budget: a score, or minus infinity for no limit.

    It falls from score to score until the budget is broken.

    Args:
        scores: float (units,); the larger, the sooner pruned, minus infinity for never.
        clean_accuracy: accuracy without the given units, bool (units,).
        accuracy_budget: tolerated loss.
    """
    initial = clean_accuracy(np.zeros(len(scores), dtype=bool))
    levels = np.unique(scores[scores > -np.inf])[::-1]
    for level, following in zip(levels, [*levels[1:], -np.inf], strict=True):
        if initial - clean_accuracy(scores > following) > accuracy_budget + 1e-9:
            return float(level)
    return -np.inf
