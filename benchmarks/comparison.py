"""ONP and its rivals on networks that nothing was chosen with, each policy on every model in the same environment.

    backdoor-gym zoo build 'digits-test/6[0-9][0-9]' 'digits-test/7[0-3][0-9]'
    python benchmarks/comparison.py digits --jobs 2
    python benchmarks/comparison.py cifar10 --budgets 0.01 --only "CLP u=3" mlp-0
    python benchmarks/comparison.py alone

A budget holds on the defender's clean images. A prune that breaks it is undone; five of those end the repair, and so do 100 steps.
Rankings have no stop of their own: they go on to one of those ends, or with the look-ahead, which is the same for all, until the
suspected danger is low or levels off. "attack left out" is a policy, or ridge, that met no model of the attack it is tested on.

*digits*: ``digits-test/600`` to ``659`` and the clean ones among those that follow, until there are 29. All policies run at two
points, those of ``EVERY_BUDGET`` at one and five too, on the first 24 infected models.

*cifar10*: the networks in ``models/``, the first 3,000 test images; some policies also with fewer clean images, at one point.

*alone*: learning on each of the first 20 infected ``digits-test`` models from 600 on, as in ONP's paper, at two points and at most
60 prunes, by the reward that needs no trigger.

One line a repair in ``results/onp_TABLE.jsonl``; killed and called again it goes on. Tables go to ``results/onp_TABLE.md``.
"""

import argparse
import re
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rivals import LEARNERS, GreedyReference, fits, rivals_of
from sklearn.metrics import roc_auc_score
from training import ATTACKS

from backdoor_gym import load_infected
from backdoor_gym.agents import ONP
from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.benchmarking.cells import Conditions, Result
from backdoor_gym.benchmarking.resuming import Row, RowFile, run_tasks
from backdoor_gym.benchmarking.running import make_ready, run_cell
from backdoor_gym.benchmarking.specifications import make
from backdoor_gym.models.digits_family import recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIRST = 600
BUDGETS = {"digits": (0.02, 0.01, 0.05), "cifar10": (0.01, 0.02, 0.05), "alone": (0.02,)}
CONDITIONS = {"digits": Conditions(), "cifar10": Conditions(test_samples=3000), "alone": Conditions(max_steps=60)}
EVERY_BUDGET = ("CLP u=3", "CLP auto", "rank by KL", "ridge", "ridge, look-ahead", "mlp-0")
#: Infected models at budgets other than the first.
OTHER_BUDGETS = 24
REFERENCE, LOOKING = "greedy reference", "ridge, look-ahead"
IMAGES, FEW_IMAGES = (50, 100, 200), ("CLP auto", LOOKING, "mlp-0")
SEEDED = ("random", "ONP alone", "ONP, tuned")
#: What a rival can say of the network as a whole, beside the policies' verdicts.
SIGNS = {
    "CLP u=3": ("largest UCLC z", lambda prepared: float(prepared.features[:, STATIC_FEATURES.index("uclc")].max())),
    "rank by KL": ("largest KL z", lambda prepared: float(prepared.features[:, STATIC_FEATURES.index("kl")].max())),
    "rank by pull": ("evidence of the inverted trigger alone", lambda prepared: prepared.inverted.evidence),
}

#: A repair: model, policy, budget, clean images (None for all), seed.
Cell = tuple[str, str, float, int | None, int]


# ---- repairs


def cells_of(table: str, arguments: argparse.Namespace) -> list[Cell]:
    """All repairs of a table."""
    budgets = arguments.budgets or BUDGETS[table]
    if table == "cifar10":
        cells = []
        for few in (None, *arguments.images):
            for file in sorted((HERE / "models").glob("*.safetensors")):
                policies = [policy for policy in rivals_of(attack_of(str(file))) if few is None or policy in FEW_IMAGES]
                at = budgets if few is None else BUDGETS[table][:1]
                cells += [(str(file), policy, budget, few, 0) for budget in at for policy in policies]
        return cells
    if table == "alone":
        names = (f"digits-test/{seed}" for seed in count(FIRST))
        infected = list(islice((name for name in names if attack_of(name) != "clean"), arguments.models or 20))
        policies = [(seed, policy) for seed in range(3) for policy in LEARNERS if policy in SEEDED or seed == 0]
        return [(name, policy, budgets[0], None, seed) for seed, policy in policies for name in infected]
    names = [f"digits-test/{seed}" for seed in range(FIRST, FIRST + (arguments.models or 60))]
    clean = sum(attack_of(name) == "clean" for name in names)
    others = (f"digits-test/{seed}" for seed in count(FIRST + len(names)))
    names += islice((name for name in others if attack_of(name) == "clean"), max(0, arguments.clean - clean))
    infected = [name for name in names if attack_of(name) != "clean"]
    cells = []
    for name in names:
        for budget in budgets:
            if budget != BUDGETS[table][0] and name not in infected[:OTHER_BUDGETS]:
                continue
            policies = [
                policy for policy in rivals_of(attack_of(name)) if budget == BUDGETS[table][0] or policy in EVERY_BUDGET
            ]
            if budget == BUDGETS[table][0] and name in infected[: arguments.reference]:
                policies.append(REFERENCE)
            cells += [(name, policy, budget, None, 0) for policy in policies]
    return cells


def attack_of(model: str) -> str:
    """The attack of a model; one of the family is not made for it."""
    split, _, seed = model.partition("/")
    return recipe(split, int(seed)).attack if seed.isdecimal() else load_infected(model).facts["attack"]


def named(model: str) -> str:
    """What a model is called in the records, wherever its file lies."""
    return model.removesuffix(".safetensors").rpartition("models/")[2]


def repair_model(table: str, model: str, few: int | None, cells: list[Cell], file: RowFile) -> None:
    """The repairs of one model, with that many clean images."""
    conditions = Conditions(few, CONDITIONS[table].test_samples, CONDITIONS[table].max_steps)
    ready = make_ready(model, conditions)
    attack = ready.model.facts["attack"]
    makers = {
        **(LEARNERS if table == "alone" else rivals_of(attack)),
        REFERENCE: lambda env, seed: GreedyReference(env),
    }
    env, step = ready.env, ready.env.step
    for _, policy, budget, _, seed in cells:
        paid: list[float] = []
        acting: list[Any] = []

        def counted(action: int, paid: list[float] = paid) -> Any:
            answer = step(action)
            paid.append(float(answer[1]))
            return answer

        def maker(env: Any, seed: int, policy: str = policy, budget: float = budget, paid=paid, acting=acting) -> Any:
            made = make(makers[policy], env, budget, seed)
            paid.clear()  # of what it learned on
            if finish := getattr(made, "finish", None):

                def counted_finish(env: Any) -> float:
                    paid.append(float(finish(env)))
                    return paid[-1]

                made.finish = counted_finish
            acting.append(made)
            return made

        env.step = counted
        result = run_cell(Result(named(model), policy, budget, seed, "", {}), maker, ready, conditions)
        row: Row = {"model": result.model, "attack": attack, "corruption": ready.model.facts.get("corruption", "none")}
        row |= {"policy": policy, "budget": budget, "clean_images": few, "seed": seed, "return": sum(paid)}
        row |= {"acc_drop": result.acc_lost, "asr": result.asr, "der": result.der, "pruned": result.pruned}
        if type(acting[0]) is ONP:
            row["verdict"] = env.session.prepared.evidence.probability
        if policy in SIGNS:
            row["verdict"] = SIGNS[policy][1](env.session.prepared)
        file.add(**row)


# ---- tables


def by_policy(rows: Sequence[Row], infected: bool = True) -> dict[str, list[Row]]:
    """The rows of infected, or else of clean models, by policy."""
    policies: dict[str, list[Row]] = {}
    for row in rows:
        if (row["der"] is not None) == infected:
            policies.setdefault(row["policy"], []).append(row)
    return policies


def average(rows: Sequence[Row], key: str, factor: float = 1) -> float:
    return factor * mean(row[key] for row in rows)


def paired(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """DER less that of another policy, a mean over the models of both, with its standard error."""
    other = {row["model"]: row["der"] for row in others}
    models = [model for model in dict.fromkeys(row["model"] for row in rows) if model in other]
    differences = [mean(row["der"] for row in rows if row["model"] == model) - other[model] for model in models]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return f"{mean(differences or [0]):+.3f} ± {error:.3f}"


def head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def infected_table(rows: Sequence[Row]) -> list[str]:
    policies = by_policy(rows)
    text = head("policy", "models", "ACC lost (points)", "ASR", "worst ASR", "DER", "pruned", f"DER less {LOOKING}")
    for policy, own in policies.items():
        text.append(
            f"| {policy} | {len(own)} | {average(own, 'acc_drop', 100):.2f} | {average(own, 'asr'):.3f} | "
            f"{max(row['asr'] for row in own):.3f} | {average(own, 'der'):.3f} | {average(own, 'pruned'):.1f} | "
            f"{paired(own, policies.get(LOOKING, []))} |"
        )
    return text


def clean_table(rows: Sequence[Row]) -> list[str]:
    text = head("policy", "models", "ACC lost (points)", "untouched", "pruned")
    for policy, own in by_policy(rows, infected=False).items():
        untouched = mean(row["pruned"] == 0 for row in own)
        lost, pruned = average(own, "acc_drop", 100), average(own, "pruned")
        text.append(f"| {policy} | {len(own)} | {lost:.2f} | {untouched:.2f} | {pruned:.1f} |")
    return text


def seeds_table(rows: Sequence[Row]) -> list[str]:
    """Means over the training seeds of a policy, its last number (``mlp-0``), with the standard deviation of their means."""
    policies, groups = by_policy(rows), dict[str, list[list[Row]]]()
    for policy, own in policies.items():
        if seeded := re.fullmatch(r"(\w+)-\d+(.*)", policy):
            groups.setdefault("".join(seeded.groups()), []).append(own)
    text = head("policy", "seeds", "ACC lost (points)", "ASR", "DER", f"DER less {LOOKING}")
    for policy, seeds in groups.items():
        if len(seeds) > 1:
            figures = [
                [average(own, key, by) for own in seeds] for key, by in (("acc_drop", 100), ("asr", 1), ("der", 1))
            ]
            cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in figures]
            difference = paired([row for own in seeds for row in own], policies.get(LOOKING, []))
            text.append(f"| {policy} | {len(seeds)} | {' | '.join(cells)} | {difference} |")
    return text


def attack_table(rows: Sequence[Row]) -> list[str]:
    """Mean DER by attack."""
    text = head("policy", *ATTACKS, "mean")
    for policy, own in by_policy(rows).items():
        ders = [[row["der"] for row in own if row["attack"] == attack] for attack in ATTACKS]
        cells = [f"{mean(values):.3f}" if values else "" for values in ders]
        text.append(f"| {policy} | {' | '.join(cells)} | {mean(mean(values) for values in ders if values):.3f} |")
    return text


def verdict_table(rows: Sequence[Row]) -> list[str]:
    """AUROC of the verdict or sign, clean against infected models."""
    text, judged = head("policy", "AUROC"), [row for row in rows if "verdict" in row]
    for policy in dict.fromkeys(row["policy"] for row in judged):
        verdicts = [(row["attack"] != "clean", row["verdict"]) for row in judged if row["policy"] == policy]
        if len({infected for infected, _ in verdicts}) == 2:
            sign = f"{policy}: {SIGNS[policy][0]}" if policy in SIGNS else policy
            text.append(f"| {sign} | {roc_auc_score(*zip(*verdicts, strict=True)):.3f} |")
    return text


def model_table(rows: Sequence[Row]) -> list[str]:
    """One line a network, one column a policy: ACC lost (points) / ASR."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    shown = {
        (row["model"], row["policy"]): f"{100 * row['acc_drop']:.2f}"
        + ("" if row["asr"] is None else f" / {row['asr']:.3f}")
        for row in rows
    }
    models = sorted({row["model"] for row in rows})
    lines = [f"| {model} | {' | '.join(shown.get((model, policy), '') for policy in policies)} |" for model in models]
    return [*head("network", *policies), *lines]


def images_table(rows: Sequence[Row]) -> list[str]:
    text, policies = head("policy", "clean images", "ACC lost (points)", "ASR"), by_policy(rows)
    for policy in FEW_IMAGES:
        for few in (*IMAGES, None):
            own = [row for row in policies.get(policy, []) if row["clean_images"] == few]
            if own:
                lost, asr = average(own, "acc_drop", 100), average(own, "asr")
                text.append(f"| {policy} | {few or 500} | {lost:.2f} | {asr:.3f} |")
    return text


def alone_table(rows: Sequence[Row]) -> list[str]:
    """Means over models and seeds; the spread is that of the means of the seeds."""
    policies = by_policy(rows)
    text = head("policy", "seeds", "return", "ACC lost (points)", "ASR", "DER", "pruned", "DER less greedy")
    for policy, own in policies.items():
        seeds = sorted({row["seed"] for row in own})
        ders = [average([row for row in own if row["seed"] == seed], "der") for seed in seeds]
        spread = f" ± {stdev(ders):.3f}" if len(ders) > 1 else ""
        text.append(
            f"| {policy} | {len(seeds)} | {average(own, 'return'):.3f} | {average(own, 'acc_drop', 100):.2f} | "
            f"{average(own, 'asr'):.3f} | {mean(ders):.3f}{spread} | {average(own, 'pruned'):.1f} | "
            f"{paired(own, policies.get('greedy', []))} |"
        )
    return text


def tables(table: str, rows: Sequence[Row]) -> str:
    """The page of a table."""
    if table == "alone":
        return "\n".join(alone_table(rows)) + "\n"
    full, first = [row for row in rows if row["clean_images"] is None], BUDGETS[table][0]
    parts = []
    for budget in sorted({row["budget"] for row in full}):
        own = [row for row in full if row["budget"] == budget and row["policy"] != REFERENCE]
        title = f"Budget of {100 * budget:g} points"
        parts += [(f"{title}, infected models", infected_table(own)), (f"{title}, clean models", clean_table(own))]
    headline = [row for row in full if row["budget"] == first]
    referred = {row["model"] for row in headline if row["policy"] == REFERENCE}
    of_referred = [row for row in headline if row["model"] in referred]
    parts += [(f"The models of the greedy reference, {100 * first:g} points", infected_table(of_referred))]
    parts += [(f"Policies of several training seeds, {100 * first:g} points", seeds_table(headline))]
    parts += [(f"Mean DER by attack, {100 * first:g} points", attack_table(headline))]
    if table == "cifar10":
        parts += [("Each network, 1 point: ACC lost (points) / ASR", model_table(headline))]
        at_first = [row for row in rows if row["budget"] == first]
        parts += [("Fewer clean images, 1 point, infected models", images_table(at_first))]
    parts += [("AUROC of the verdict, clean against infected models", verdict_table(headline))]
    return "\n".join("\n".join([f"{title}:\n", *lines, ""]) for title, lines in parts if len(lines) > 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=tuple(BUDGETS))
    parser.add_argument("--models", type=int, help="60 of digits, 20 of alone")
    parser.add_argument("--clean", type=int, default=29, help="clean models of digits at least")
    parser.add_argument("--reference", type=int, default=15, help="infected models of the greedy reference")
    parser.add_argument("--images", type=int, nargs="*", default=list(IMAGES), help="fewer clean images of cifar10")
    parser.add_argument("--budgets", type=float, nargs="+")
    parser.add_argument("--only", nargs="*", help="policies to run, default all")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    fits()
    key = ("model", "policy", "seed") if arguments.table == "alone" else ("model", "policy", "budget", "clean_images")
    file = RowFile(RESULTS / f"onp_{arguments.table}.jsonl", key)
    done = {tuple(row[field] for field in key) for row in file.rows()}
    work: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in cells_of(arguments.table, arguments):
        model, policy, budget, few, seed = cell
        known = {"model": named(model), "policy": policy, "budget": budget, "clean_images": few, "seed": seed}
        if tuple(known[field] for field in key) not in done and policy in (arguments.only or [policy]):
            work.setdefault((model, few), []).append(cell)
    tasks = [(arguments.table, model, few, cells) for (model, few), cells in work.items()]
    run_tasks(repair_model, tasks, file, arguments.jobs, progress=True)
    (RESULTS / f"onp_{arguments.table}.md").write_text(tables(arguments.table, file.rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
