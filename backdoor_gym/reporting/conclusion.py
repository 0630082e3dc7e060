"""The verdict of a repair in plain words."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import RepairResult

#: Share of triggered images up to which a backdoor is called closed, and from which on it is called open.
CLOSED, OPEN = 0.1, 0.5
#: Loss of accuracy that is too much to be called a success.
COSTLY = 0.05


@dataclass(frozen=True)
class Conclusion:
    """What is to be remembered of a repair.

    Attributes:
        tone: "good", "warning" or "bad".
        headline: a sentence.
        sentences: what it rests on.
    """

    tone: str
    headline: str
    sentences: list[str]


def conclude(result: "RepairResult") -> Conclusion:
    """Verdict, what was done, and whether it helped, as far as that is known."""
    count, total, score = len(result.pruned), len(result.neurons), result.verdict
    label = result.suspected_target
    whose = "" if label is None else f" that calls label {label}"
    sentences = []
    if not count:
        if score is not None and score >= 0.5:
            tone, headline = "warning", f"Signs of a backdoor{whose}, but nothing was pruned"
            sentences.append("No neuron could be pruned within the accuracy budget, or none was worth it.")
        else:
            tone, headline = "good", "No sign of a backdoor: nothing was pruned"
            sentences.append("The network is as it came.")
            if score is None:
                headline = "Nothing was pruned"
    elif score is None:
        tone, headline = "good", f"{count} of {total} neurons pruned by {result.policy}"
        sentences.append(f"{result.policy} gives no verdict on whether there is a backdoor at all.")
    else:
        tone, headline = "good", f"Signs of a backdoor{whose}: {count} of {total} neurons pruned"
    if score is not None:
        sentences.append(f"The policy puts the probability of a backdoor at {score:.1%}, seen before the first prune.")
    before, after = result.before.asr, result.after.asr
    if before is None or after is None:
        sentences.append("No trigger is known for this network, so how often an attack succeeds cannot be measured.")
    else:
        worked = f"The known trigger worked on {before:.1%} of the images; it works on {after:.1%} now."
        sentences.append(worked if count else f"The known trigger works on {after:.1%} of the images.")
        if after >= OPEN:
            tone = "bad"
            headline = f"The backdoor is still open. {headline}"
        elif after > CLOSED:
            tone = "warning"
            headline = f"The backdoor is not quite closed. {headline}"
    if count:
        where = f"the defender's {len(result.infected.clean)} clean images"
        sentences.append(f"{_moved(where, result.clean_acc_before, result.clean_acc_after)}.")
        test = result.infected.test
        if test is not None and result.before.acc is not None and result.after.acc is not None:
            where = f"{len(test)} test images that the repair did not see"
            sentences.append(f"{_moved(where, result.before.acc, result.after.acc)}.")
            if result.before.acc - result.after.acc > COSTLY:
                tone, headline = "warning" if tone == "good" else tone, f"{headline}, at a price in accuracy"
    return Conclusion(tone, headline, sentences)


def _moved(where: str, before: float, after: float) -> str:
    return f"Accuracy on {where} went from {before:.1%} to {after:.1%} ({100 * (after - before):+.1f} points)"
