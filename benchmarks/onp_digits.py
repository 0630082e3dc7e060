"""ONP and its rivals on digits networks that nothing was chosen with, at fixed accuracy budgets.

    python benchmarks/train_policies.py  # says how its models are built
    backdoor-gym zoo build 'digits-test/*' --most 80
    python benchmarks/onp_digits.py --jobs 2

Every policy runs in the same environment: the budget holds on the defender's clean images and a prune that breaks it is
undone, five of those end the repair, and so do 60 steps. ACC and ASR are those of the whole test split. Rivals' thresholds
and all look-aheads are chosen on ``digits-val`` (kept in ``results/onp_digits_choices.json``). "attack left out" is a row
of the policy, or ridge, that met no model of the attack it is tested on. Killed and called again it goes on where it
was: one line a repair in ``results/onp_digits.jsonl``; the tables go to ``results/onp_digits.md``.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rivals import Column, RidgePolicy, fit_ridge, greedy_reference
from sklearn.linear_model import Ridge
from train_policies import ATTACKS, POLICIES, TRAINING, VALIDATION

import backdoor_gym
from backdoor_gym.agents import ONP, LookAhead
from backdoor_gym.agents.training import LOOKS, SCORE_SAMPLES
from backdoor_gym.agents.validation import run, summary
from backdoor_gym.agents.warm_start import examples
from backdoor_gym.baselines import CLP, RandomPolicy
from backdoor_gym.metrics import der
from backdoor_gym.pruning.applying import write_mask

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "onp_digits.jsonl"
CHOICES = RESULTS / "onp_digits_choices.json"
STEPS = 60
BUDGETS = (0.02, 0.01, 0.05)
THRESHOLDS = (-1e6, 0.5, 1.5)


def environment(names: list[str], budget: float = 0.02, **options: Any) -> gym.Env[Any, Any]:
    return gym.make(
        "backdoor_gym:BackdoorPrune-v0",
        infected=names,
        accuracy_budget=budget,
        max_steps=STEPS,
        disable_env_checker=True,
        **options,
    )


@cache
def choices() -> dict[str, Any]:
    """The ridge, its threshold and its look-ahead, from training and validation models; made once."""
    if CHOICES.is_file():
        return json.loads(CHOICES.read_text())
    guide = dict(zip(TRAINING, examples(TRAINING, score_samples=SCORE_SAMPLES), strict=True))
    ridge = fit_ridge(list(guide.values()))
    env = environment(VALIDATION, reward="oracle")
    found: dict[str, Any] = {"coefficients": ridge.coef_.tolist(), "intercept": float(ridge.intercept_)}
    ratings = {
        threshold: summary(run(RidgePolicy(env, ridge, threshold=threshold), env, VALIDATION))["der"]
        for threshold in THRESHOLDS
    }
    threshold = max(ratings, key=ratings.__getitem__)
    looks = {
        look: summary(run(RidgePolicy(env, ridge, threshold=threshold, look_ahead=look), env, VALIDATION))["der"]
        for look in filter(None, LOOKS)
    }
    best = max(looks, key=looks.__getitem__)
    found |= {"threshold": threshold, "thresholds": list(ratings.items()), "look_ahead": asdict(best)}
    found["attack_left_out"] = {}
    for attack in ATTACKS:
        others = [one for name, one in guide.items() if backdoor_gym.load_infected(name).facts["attack"] != attack]
        partial = fit_ridge(others)
        found["attack_left_out"][attack] = {
            "coefficients": partial.coef_.tolist(),
            "intercept": float(partial.intercept_),
        }
    found["look_aheads"] = [[asdict(look), rating] for look, rating in looks.items()]
    CHOICES.write_text(json.dumps(found, indent=1) + "\n")
    return found


def ridge(left_out: str | None = None) -> Ridge:
    fitted = choices() if left_out is None else choices()["attack_left_out"][left_out]
    model = Ridge()
    model.coef_, model.intercept_ = np.array(fitted["coefficients"]), fitted["intercept"]
    return model


def makers(attack: str) -> dict[str, Callable[[Any, float], Any]]:
    """Policies by name for models of an attack, each made for an environment and a budget."""
    look = LookAhead(**choices()["look_ahead"])
    threshold = choices()["threshold"]
    found: dict[str, Callable[[Any, float], Any]] = {
        "random": lambda env, budget: RandomPolicy(0),
        "CLP u=3": lambda env, budget: CLP(3.0),
        "CLP auto": lambda env, budget: CLP("auto", env, budget),
        "rank by KL": lambda env, budget: Column(env, "kl"),
        "rank by pull": lambda env, budget: Column(env, "pull"),
        "ridge": lambda env, budget: RidgePolicy(env, ridge(), threshold=threshold),
        "ridge, look-ahead": lambda env, budget: RidgePolicy(env, ridge(), threshold=threshold, look_ahead=look),
    }
    if attack in ATTACKS:
        found["ridge, look-ahead, attack left out"] = lambda env, budget: RidgePolicy(
            env, ridge(attack), threshold=threshold, look_ahead=look
        )
    for file in sorted(POLICIES.glob("*.safetensors")):
        name = file.stem
        if name.startswith("without-"):
            if name != f"without-{attack}":
                continue
            name = "mlp-0, attack left out"
        found[name] = lambda env, budget, file=file: ONP.load(file, env)
        if ONP.load(file).look_ahead is not None:
            found[f"{name}, no look-ahead"] = lambda env, budget, file=file: ONP.load(file, env, look_ahead=None)
    return found


def repair_all(job: tuple[str, float, list[str]]) -> list[dict[str, Any]]:
    """One model, all the policies that are still to be run."""
    name, budget, wanted = job
    torch.set_num_threads(1)
    model = backdoor_gym.load_infected(name)
    env = environment([name], budget, score_samples=100 if "greedy reference" in wanted else 0)
    before = model.evaluate()
    rows = []
    for policy in wanted:
        observation, _ = env.reset(seed=0, options={"infected": name})
        acting = None
        if policy == "greedy reference":
            mask = env.unwrapped.victim.neuron_mask(greedy_reference(env.unwrapped.victim, budget))
        else:
            acting = makers(model.facts["attack"])[policy](env, budget)
            done, state, start = False, None, np.ones(1, dtype=bool)
            while not done:
                action, state = acting.predict(observation, state, start, deterministic=True)
                observation, _, terminated, truncated, _ = env.step(int(action))
                done, start = terminated or truncated, np.zeros(1, dtype=bool)
            mask = env.unwrapped.victim.neuron_mask(env.unwrapped.pruned)
        after = model.evaluate(write_mask(model.network, env.unwrapped.victim.neurons, mask))
        row = {
            "model": name,
            "attack": model.facts["attack"],
            "corruption": model.facts.get("corruption", "none"),
            "policy": policy,
            "budget": budget,
            "acc_drop": before.acc - after.acc,
            "asr": after.asr,
            "der": None if before.asr is None else der(before.acc, before.asr, after.acc, after.asr),
            "pruned": int((~mask).sum()),
        }
        if type(acting) is ONP:
            row["verdict"] = acting.verdict(env.reset(seed=0, options={"infected": name})[0])
        rows.append(row)
    env.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=80)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--reference", type=int, default=15, help="infected models of the greedy reference")
    parser.add_argument("--only", nargs="*", help="policies to run, default all")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    choices()
    names = [f"digits-test/{seed}" for seed in range(arguments.models)]
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []
    done = {(row["policy"], row["model"], row["budget"]) for row in rows}
    jobs = []
    attack_of = {name: backdoor_gym.load_infected(name).facts["attack"] for name in names}
    infected = [name for name in names if attack_of[name] != "clean"]
    for budget in arguments.budgets:
        for name in names:
            wanted = [one for one in makers(attack_of[name]) if not arguments.only or one in arguments.only]
            mine = [policy for policy in wanted if (policy, name, budget) not in done]
            with_reference = budget == 0.02 and name in infected[: arguments.reference]
            if with_reference and ("greedy reference", name, budget) not in done:
                mine.append("greedy reference")
            if mine:
                jobs.append((name, budget, mine))
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool, ROWS.open("a") as file:
        for index, found in enumerate(pool.map(repair_all, jobs)):
            rows.extend(found)
            file.writelines(json.dumps(row) + "\n" for row in found)
            file.flush()
            print(f"{index + 1} of {len(jobs)}", flush=True)
    (RESULTS / "onp_digits.md").write_text(tables(rows))


def tables(rows: list[dict[str, Any]]) -> str:
    """Means over infected models at each budget, differences to the ridge with look-ahead, and the clean models."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    text = []
    for budget in sorted({row["budget"] for row in rows}):
        mine = {
            policy: {row["model"]: row for row in rows if row["policy"] == policy and row["budget"] == budget}
            for policy in policies
        }
        against = mine.get("ridge, look-ahead", {})
        text += [
            f"Budget {100 * budget:g} points, infected models:\n",
            "| policy | models | ACC lost (points) | ASR | DER | pruned | DER less ridge with look-ahead |",
            "|---|---|---|---|---|---|---|",
        ]
        for policy in policies:
            one = [row for row in mine[policy].values() if row["der"] is not None]
            if one:
                paired = [row["der"] - against[row["model"]]["der"] for row in one if row["model"] in against]
                error = stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else 0.0
                text.append(
                    f"| {policy} | {len(one)} | {100 * mean(row['acc_drop'] for row in one):.2f} | "
                    f"{mean(row['asr'] for row in one):.3f} | {mean(row['der'] for row in one):.3f} | "
                    f"{mean(row['pruned'] for row in one):.1f} | {mean(paired or [0]):+.3f} ± {error:.3f} |"
                )
        text += [
            f"\nBudget {100 * budget:g} points, clean models:\n",
            "| policy | models | ACC lost (points) | untouched | pruned |",
            "|---|---|---|---|---|",
        ]
        for policy in policies:
            one = [row for row in mine[policy].values() if row["der"] is None]
            if one:
                text.append(
                    f"| {policy} | {len(one)} | {100 * mean(row['acc_drop'] for row in one):.2f} | "
                    f"{mean(row['pruned'] == 0 for row in one):.2f} | {mean(row['pruned'] for row in one):.1f} |"
                )
        text.append("")
    text += [*_against_reference(rows), "", "Mean DER by attack, budget 2 points:\n"]
    text += [f"| policy | {' | '.join(ATTACKS)} |", "|---|---|---|---|---|"]
    for policy in policies:
        cells = []
        for attack in ATTACKS:
            one = [row for row in rows if (row["policy"], row["attack"], row["budget"]) == (policy, attack, 0.02)]
            cells.append(f"{mean(row['der'] for row in one):.3f}" if one else "")
        text.append(f"| {policy} | {' | '.join(cells)} |")
    text += ["", "AUROC of the verdict, clean against infected models:\n", "| policy | AUROC |", "|---|---|"]
    from sklearn.metrics import roc_auc_score

    for policy in policies:
        judged = {row["model"]: row for row in rows if row["policy"] == policy and "verdict" in row}
        if judged:
            labels = [row["attack"] != "clean" for row in judged.values()]
            text.append(f"| {policy} | {roc_auc_score(labels, [row['verdict'] for row in judged.values()]):.3f} |")
    return "\n".join(text) + "\n"


def _against_reference(rows: list[dict[str, Any]]) -> list[str]:
    """Means of all policies over the models of the greedy reference."""
    mine = {(row["policy"], row["model"]): row for row in rows if row["budget"] == 0.02 and row["der"] is not None}
    names = [model for policy, model in mine if policy == "greedy reference"]
    text = [
        f"The {len(names)} models of the greedy reference, budget 2 points:\n",
        "| policy | ACC lost (points) | ASR | DER | pruned |",
        "|---|---|---|---|---|",
    ]
    for policy in dict.fromkeys(policy for policy, _ in mine):
        one = [mine[policy, name] for name in names if (policy, name) in mine]
        if names and len(one) == len(names):
            text.append(
                f"| {policy} | {100 * mean(row['acc_drop'] for row in one):.2f} | {mean(row['asr'] for row in one):.3f} "
                f"| {mean(row['der'] for row in one):.3f} | {mean(row['pruned'] for row in one):.1f} |"
            )
    return text


if __name__ == "__main__":
    main()
