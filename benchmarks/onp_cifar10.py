"""ONP and its rivals on CIFAR-10 networks; no policy has met a network of that data set or any of these architectures.

    python benchmarks/train_policies.py  # says how its models are built
    python benchmarks/onp_cifar10.py --jobs 2

The networks are those of ``benchmarks/models`` (width 16). The protocol is that of ``comparison.py``, with the first 3,000
test images, the defender's 500 clean images, and budgets of 1, 2 and 5 points; some policies also with 50, 100 and 200
clean images at one point. One line a repair in ``results/onp_cifar10.jsonl``; the tables go to ``results/onp_cifar10.md``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from comparison import (
    RESULTS,
    Job,
    Row,
    attack_table,
    by_policy,
    clean_table,
    infected_table,
    makers,
    run_all,
    verdict_table,
)

import backdoor_gym

MODELS = Path(__file__).parent / "models"
BUDGETS = (0.01, 0.02, 0.05)
IMAGES = (50, 100, 200)
TEST_IMAGES = 3000
FEW_IMAGES = ("CLP auto", "ridge, look-ahead", "mlp-0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--images", type=int, nargs="*", default=list(IMAGES), help="fewer clean images, at one point")
    parser.add_argument("--only", nargs="*", help="policies to run, default all")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    jobs = []
    files = sorted(MODELS.glob("*.safetensors"))
    attack_of = {file: backdoor_gym.load_infected(file).facts["attack"] for file in files}
    for count in (None, *arguments.images):
        for file in files:
            wanted = [one for one in makers(attack_of[file]) if not arguments.only or one in arguments.only]
            if count is None:
                policies = {budget: list(wanted) for budget in arguments.budgets}
            else:
                policies = {BUDGETS[0]: [one for one in wanted if one in FEW_IMAGES]}
            jobs.append(Job(str(file), policies, count, TEST_IMAGES))
    rows = run_all(jobs, RESULTS / "onp_cifar10.jsonl", arguments.jobs)
    (RESULTS / "onp_cifar10.md").write_text(tables(rows), encoding="utf-8")


def tables(rows: Sequence[Row]) -> str:
    """Means over infected and over clean models at each budget, each network, the verdict, and fewer clean images."""
    text = []
    full = [row for row in rows if row["clean_images"] is None]
    for budget in sorted({row["budget"] for row in full}):
        mine = [row for row in full if row["budget"] == budget]
        text += [f"Budget {100 * budget:g} points, infected networks:\n", *infected_table(mine, "ridge, look-ahead")]
        text += [f"\nBudget {100 * budget:g} points, clean networks:\n", *clean_table(mine), ""]
    headline = [row for row in full if row["budget"] == BUDGETS[0]]
    text += ["Mean DER by attack, budget 1 point:\n", *attack_table(headline)]
    text += ["\nEach network, budget 1 point: ACC lost (points) / ASR:\n", *_each(headline)]
    text += ["\nAUROC of the verdict, clean against infected networks:\n", *verdict_table(headline)]
    text += ["\nFewer clean images, budget 1 point, infected networks:\n"]
    text += ["| policy | clean images | ACC lost (points) | ASR |", "|---|---|---|---|"]
    for policy in FEW_IMAGES:
        for count in (*IMAGES, None):
            mine = [
                row
                for row in rows
                if (row["policy"], row["clean_images"], row["budget"]) == (policy, count, BUDGETS[0])
            ]
            mine = [row for row in mine if row["der"] is not None]
            if mine:
                lost, asr = 100 * mean(row["acc_drop"] for row in mine), mean(row["asr"] for row in mine)
                text.append(f"| {policy} | {count or 500} | {lost:.2f} | {asr:.3f} |")
    return "\n".join(text) + "\n"


def _each(rows: Sequence[Row]) -> list[str]:
    """One line a network, one column a policy."""
    policies = by_policy(rows)
    text = [f"| network | {' | '.join(policies)} |", "|---|" + "---|" * len(policies)]
    for model in sorted({row["model"] for row in rows}):
        cells = []
        for found in policies.values():
            row = found.get(model)
            asr = "" if row is None or row["asr"] is None else f" / {row['asr']:.3f}"
            cells.append("" if row is None else f"{100 * row['acc_drop']:.2f}{asr}")
        text.append(f"| {model} | {' | '.join(cells)} |")
    return text


if __name__ == "__main__":
    main()
