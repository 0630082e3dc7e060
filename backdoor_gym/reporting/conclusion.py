"""The verdict of a repair in plain words."""

from typing import TYPE_CHECKING, NamedTuple

from ..analysis.evidence import SILENT
from ..outcomes import UNREPAIRABLE, UNTOUCHED

if TYPE_CHECKING:
    from .result import RepairResult

#: Share of triggered images up to which a backdoor is called closed, and from which on it is called open.
CLOSED, OPEN = 0.1, 0.5
#: Loss of accuracy that is too much to be called a success.
COSTLY = 0.05


class Conclusion(NamedTuple):
    """The tone ("good", "warning" or "bad"), a headline, and the sentences that it rests on."""

    tone: str
    headline: str
    sentences: list[str]


def conclude(result: "RepairResult") -> Conclusion:
    """The outcome, what was done, and whether it helped, as far as that is known."""
    count, total, probability = len(result.pruned), len(result.neurons), result.verdict
    before, after, test = result.before, result.after, result.infected.test
    tone, sentences = "good", []
    signs = f"Signs of a backdoor{'' if result.suspected_target is None else f' that calls label {result.suspected_target}'}"
    if probability is None:
        headline = f"{count} of {total} neurons pruned by {result.policy}" if count else "Nothing was pruned"
        sentences.append("No verdict was asked for: a rule prunes any network, infected or not.")
    elif result.outcome == UNTOUCHED and not result.evidence.signs:
        tone, headline = "warning", "Nothing tells whether there is a backdoor: the network is as it came"
        sentences.append(f"{SILENT[0].upper()}{SILENT[1:]}.")
    elif result.outcome == UNTOUCHED:
        headline = "No sign of a backdoor: the network is as it came"
    elif result.outcome == UNREPAIRABLE:
        tone, headline = "warning", f"{signs}, which pruning does not remove"
        sentences.append(
            f"{count} neurons were pruned, and the signs stay."
            if count
            else "Pruning did not remove the signs within the accuracy budget. The network is as it came."
        )
        sentences.append("A larger accuracy budget may help. Do not use this network where an attacker can reach it.")
    else:
        headline = f"{signs}: {count} of {total} neurons pruned"
    if probability is not None:
        sentences.append(f"The probability of a backdoor was {probability:.1%} before the first prune.")
    if before.asr is None or after.asr is None:
        sentences.append("No trigger is known for this network, so how often an attack succeeds cannot be measured.")
    else:
        worked = f"The known trigger worked on {before.asr:.1%} of the images; it works on {after.asr:.1%} now."
        sentences.append(worked if count else f"The known trigger works on {after.asr:.1%} of the images.")
        if after.asr >= OPEN:
            tone, headline = "bad", f"The backdoor is still open. {headline}"
        elif after.asr > CLOSED:
            tone, headline = "warning", f"The backdoor is not quite closed. {headline}"
    if count:
        where = f"the defender's {len(result.infected.clean)} clean images"
        sentences.append(_moved(where, result.clean_acc_before, result.clean_acc_after))
        sentences.append(
            f"On the half of them that guards the accuracy the mean probability of the true label fell by {result.lost} points "
            "(± its standard error)."
        )
        if test is not None and before.acc is not None and after.acc is not None:
            sentences.append(_moved(f"{len(test)} test images that the repair did not see", before.acc, after.acc))
            if before.acc - after.acc > COSTLY:
                tone, headline = "warning" if tone == "good" else tone, f"{headline}, at a price in accuracy"
    return Conclusion(tone, headline, sentences)


def _moved(where: str, before: float, after: float) -> str:
    return f"Accuracy on {where} went from {before:.1%} to {after:.1%} ({100 * (after - before):+.1f} points)."
