"""Why a neuron was pruned, in words: its features against those of its layer."""

from typing import NamedTuple

import numpy as np

from ..analysis.features import STATIC_FEATURES

#: From so many standard deviations on a feature is named.
NOTICED, TOLD = 1.0, 1.5
MOST_CHIPS, MOST_TOLD = 5, 3


class Meaning(NamedTuple):
    """A feature's short name, and what it means far above and far below the layer's mean; "" where that speaks for nothing."""

    label: str
    high: str = ""
    low: str = ""


MEANINGS = {
    "uclc": Meaning("UCLC", "weights that amplify unusually"),
    "kl": Meaning("KL", "other inputs in training than from clean images"),
    "log_variance_ratio": Meaning("variance", low="quieter on clean images than in training"),
    "mean_shift": Meaning("mean shift", "another mean in training than on clean images"),
    "activation": Meaning("activation", low="hardly used by clean images"),
    "weight": Meaning("BN weight"),
    "bias": Meaning("BN bias"),
    "saliency": Meaning("saliency", low="hardly needed for clean answers"),
    "pull": Meaning("pull", "pushes towards the suspected label under the trigger that was found"),
}
UNREMARKABLE = "Nothing stands out by itself."


class Chip(NamedTuple):
    """A feature of a neuron, its distance from its layer's mean in standard deviations, and whether that is suspicious."""

    label: str
    score: float
    suspicious: bool


class Reasons(NamedTuple):
    """The most outstanding features of a neuron, the farthest first, and what the suspicious ones mean, a sentence."""

    chips: list[Chip]
    words: str


def reasons(features: np.ndarray) -> Reasons:
    """Of the static features of one neuron, float (len(STATIC_FEATURES),)."""
    chips, said = [], []
    scores = {name: float(score) for name, score in zip(STATIC_FEATURES, features, strict=True) if name != "depth"}
    for name, score in sorted(scores.items(), key=lambda pair: -abs(pair[1])):
        if abs(score) < NOTICED:
            break
        meaning = MEANINGS.get(name, Meaning(name.replace("_", " ")))
        words = meaning.high if score > 0 else meaning.low
        chips.append(Chip(meaning.label, score, bool(words)))
        if words and abs(score) >= TOLD:
            said.append(words)
    sentence = "; ".join(said[:MOST_TOLD])
    return Reasons(chips[:MOST_CHIPS], f"{sentence[0].upper()}{sentence[1:]}." if sentence else UNREMARKABLE)
