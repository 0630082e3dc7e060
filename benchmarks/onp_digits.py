"""ONP and its rivals on digits networks that nothing was chosen with, at fixed accuracy budgets.

    python benchmarks/train_policies.py  # says how its models are built
    backdoor-gym zoo build 'digits-test/6[0-9][0-9]' 'digits-test/7[0-3][0-9]'
    python benchmarks/onp_digits.py --jobs 2

The protocol is that of ``comparison.py``, with the whole test split, on ``digits-test/600`` to ``659`` and the clean ones among
those that follow, until there are 29: what repairs of 0 to 519 showed changed how a trigger is sought and where a repair
begins and ends. "attack left out" is a row of the policy, or ridge, that met no model of the attack it is tested on. All
policies run at two points, those of ``EVERY_BUDGET`` at one and five too, on the first ``OTHER_BUDGETS`` infected models.
One line a repair in ``results/onp_digits.jsonl``; the tables go to
``results/onp_digits.md``, the curve to ``results/onp_digits.png``.
"""

import argparse
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from comparison import (
    REFERENCE,
    RESULTS,
    Job,
    Row,
    attack_table,
    clean_table,
    infected_table,
    makers,
    run_all,
    seeds_table,
    verdict_table,
)
from matplotlib import pyplot as plt

from backdoor_gym.models.family import recipe

BUDGETS = (0.02, 0.01, 0.05)
EVERY_BUDGET = ("CLP u=3", "CLP auto", "rank by KL", "ridge", "ridge, look-ahead", "mlp-0")
FIRST = 600
#: Infected models at budgets other than the first.
OTHER_BUDGETS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--clean", type=int, default=29, help="clean models at least")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--reference", type=int, default=15, help="infected models of the greedy reference")
    parser.add_argument("--only", nargs="*", help="policies to run, default all")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    attack_of: dict[str, str] = {}
    for seed in count(FIRST):
        enough = seed >= FIRST + arguments.models
        if enough and list(attack_of.values()).count("clean") >= arguments.clean:
            break
        attack = recipe("digits-test", seed).attack
        if not enough or attack == "clean":
            attack_of[f"digits-test/{seed}"] = attack
    names = list(attack_of)
    infected = [name for name in names if attack_of[name] != "clean"]
    jobs = []
    for name in names:
        wanted = [one for one in makers(attack_of[name]) if not arguments.only or one in arguments.only]
        policies = {
            budget: [one for one in wanted if budget == BUDGETS[0] or one in EVERY_BUDGET]
            for budget in arguments.budgets
            if budget == BUDGETS[0] or name in infected[:OTHER_BUDGETS]
        }
        if BUDGETS[0] in policies and name in infected[: arguments.reference]:
            policies[BUDGETS[0]].append(REFERENCE)
        jobs.append(Job(name, policies))
    rows = run_all(jobs, RESULTS / "onp_digits.jsonl", arguments.jobs)
    (RESULTS / "onp_digits.md").write_text(tables(rows), encoding="utf-8")
    draw(rows, RESULTS / "onp_digits.png")


def tables(rows: Sequence[Row]) -> str:
    """Means over infected and over clean models at each budget, and the verdict."""
    text = []
    for budget in sorted({row["budget"] for row in rows}):
        mine = [row for row in rows if row["budget"] == budget]
        text += [f"Budget {100 * budget:g} points, infected models:\n"]
        text += infected_table([row for row in mine if row["policy"] != REFERENCE], "ridge, look-ahead")
        if any(row["der"] is None for row in mine):
            text += [f"\nBudget {100 * budget:g} points, clean models:\n", *clean_table(mine)]
        text.append("")
    main_rows = [row for row in rows if row["budget"] == BUDGETS[0]]
    names = {row["model"] for row in main_rows if row["policy"] == REFERENCE}
    if names:
        text += [f"The {len(names)} models of the greedy reference, budget 2 points:\n"]
        text += infected_table([row for row in main_rows if row["model"] in names], "ridge, look-ahead")
    text += ["\nPolicies of several training seeds, budget 2 points:\n", *seeds_table(main_rows, "ridge, look-ahead")]
    text += ["\nMean DER by attack, budget 2 points:\n", *attack_table(main_rows)]
    text += ["\nAUROC of the verdict, clean against infected models:\n", *verdict_table(main_rows)]
    return "\n".join(text) + "\n"


def draw(rows: Sequence[Row], file: Path) -> None:
    """ACC lost and ASR of the models that all budgets were run on, one line a policy; nothing for a single budget."""
    infected = [row for row in rows if row["der"] is not None and row["policy"] in EVERY_BUDGET]
    models = {budget: {row["model"] for row in infected if row["budget"] == budget} for budget in BUDGETS}
    ran = sorted(100 * budget for budget in BUDGETS if models[budget])
    if len(ran) < 2:
        return  # one budget is no curve
    everywhere = set.intersection(*(found for found in models.values() if found))
    infected = [row for row in infected if row["model"] in everywhere]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for policy in EVERY_BUDGET:
        mine = [row for row in infected if row["policy"] == policy]
        budgets = sorted({row["budget"] for row in mine})
        points = [[row for row in mine if row["budget"] == budget] for budget in budgets]
        lost = [100 * mean(row["acc_drop"] for row in point) for point in points]
        axes.plot(lost, [100 * mean(row["asr"] for row in point) for point in points], "o-", label=policy)
    axes.set_xlabel("ACC lost on test images (points)")
    axes.set_ylabel("ASR (%)")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(title=f"budgets of {', '.join(f'{one:g}' for one in ran)} points")
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
