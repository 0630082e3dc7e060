"""Every policy on every model in the same environment: what the tables of digits and CIFAR-10 networks share.

The budget holds on the defender's clean images and a prune that breaks it is undone, five of those end the repair, and so
do 100 steps. ACC and ASR are those of test images. Rankings have no stop of their own and go on to one of those ends, or
with a look-ahead, which is the same for all, until the suspected danger is low or levels off; then what need not have been
pruned is given back. The ridge regressions are kept in
``results/onp_ridge.json``. Killed and called again, a table goes on where it was: one line a repair.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gymnasium as gym
from rivals import Column, fit_ridge, greedy_reference
from sklearn.metrics import roc_auc_score
from train_policies import ATTACKS, LOOK, POLICIES, TRAINING, guide

import backdoor_gym
from backdoor_gym.agents import ONP, ScoringPolicy
from backdoor_gym.agents.training import checkpoint_of
from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.baselines import CLP, RandomPolicy, Ridge
from backdoor_gym.baselines.policy import run_episode
from backdoor_gym.masking.export import write_mask
from backdoor_gym.metrics import der
from backdoor_gym.processes import one_core_each

RESULTS = Path(__file__).parent / "results"
FITS = RESULTS / "onp_ridge.json"
STEPS = 100
REFERENCE = "greedy reference"

Row = dict[str, Any]

#: What a rival can say of the network as a whole, beside the policies' verdicts.
SIGNS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "CLP u=3": ("largest UCLC z", lambda victim: float(victim.uclc_scores.max())),
    "rank by KL": ("largest KL z", lambda victim: float(victim.features[:, STATIC_FEATURES.index("kl")].max())),
    "rank by pull": ("evidence of the inverted trigger alone", lambda victim: victim.inverted.evidence),
}


@dataclass(frozen=True)
class Job:
    """One model, and the policies that repair it.

    Attributes:
        model: name or file.
        policies: names, of ``makers`` or ``REFERENCE``, by accuracy budget.
        clean_images: how many of the defender's images are used, None for all.
        test_images: how many test images ACC is measured on, None for all.
    """

    model: str
    policies: dict[float, list[str]]
    clean_images: int | None = None
    test_images: int | None = None

    @property
    def name(self) -> str:
        """What the model is called in the records, wherever its file lies."""
        return self.model.removesuffix(".safetensors").rpartition("models/")[2]


@cache
def fits() -> dict[str, Any]:
    """Coefficients of the ridge regressions, on all training models and on those without one attack; made once."""
    if FITS.is_file():
        return json.loads(FITS.read_text(encoding="utf-8"))
    school = dict(zip(TRAINING, guide(), strict=True))
    attack_of = {name: backdoor_gym.load_infected(name).facts["attack"] for name in TRAINING}
    found = {}
    for left_out in (None, *ATTACKS):
        found[str(left_out)] = asdict(fit_ridge([one for name, one in school.items() if attack_of[name] != left_out]))
    FITS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def ridge(left_out: str | None = None) -> Ridge:
    return Ridge(**fits()[str(left_out)])


def makers(attack: str) -> dict[str, Callable[[Any, float], Any]]:
    """Policies by name for models of an attack, each made for an environment and a budget."""
    found: dict[str, Callable[[Any, float], Any]] = {
        "random": lambda env, budget: RandomPolicy(0),
        "CLP u=3": lambda env, budget: CLP(3.0),
        "CLP auto": lambda env, budget: CLP("auto", env, budget),
        "rank by KL": lambda env, budget: ScoringPolicy(Column("kl"), env),
        "rank by pull": lambda env, budget: ScoringPolicy(Column("pull_now"), env),
        "ridge": lambda env, budget: ScoringPolicy(ridge(), env),
        "ridge, look-ahead": lambda env, budget: ScoringPolicy(ridge(), env, look_ahead=LOOK),
    }
    if attack in ATTACKS:
        found["ridge, look-ahead, attack left out"] = lambda env, budget: ScoringPolicy(
            ridge(attack), env, look_ahead=LOOK
        )
    for file in sorted(POLICIES.glob("*.safetensors")):
        if checkpoint_of(file).is_file():
            continue  # it is still being trained
        name = file.stem
        if name.startswith("without-"):
            if name != f"without-{attack}":
                continue
            name = "mlp-0, attack left out"
        found[name] = lambda env, budget, file=file: ONP.load(file, env)
        if name in ("mlp-0", "gnn-0"):
            found[f"{name}, no look-ahead"] = lambda env, budget, file=file: ONP.load(file, env, look_ahead=None)
    return found


def repair_all(job: Job) -> list[Row]:
    """One model, all the policies of a job at all their budgets."""
    model = backdoor_gym.load_infected(job.model)
    if job.test_images is not None and model.test is not None:
        model = replace(model, test=model.test.first(job.test_images))
    env = gym.make(
        "backdoor_gym:BackdoorPrune-v0",
        infected=model,
        max_steps=STEPS,
        score_samples=0,
        clean_samples=job.clean_images,
        disable_env_checker=True,
    )
    before = model.evaluate()
    rows = []
    for budget, policy in ((budget, policy) for budget, policies in job.policies.items() for policy in policies):
        env.unwrapped.accuracy_budget = budget
        observation, _ = env.reset(seed=0)
        victim, acting = env.unwrapped.victim, None
        if policy == REFERENCE:
            mask = victim.neuron_mask(greedy_reference(victim, budget))
        else:
            acting = makers(model.facts["attack"])[policy](env, budget)
            run_episode(acting, env.unwrapped, observation)
            mask = victim.neuron_mask(env.unwrapped.pruned)
        after = model.evaluate(write_mask(model.network, victim.neurons, mask))
        row = {
            "model": job.name,
            "attack": model.facts["attack"],
            "corruption": model.facts.get("corruption", "none"),
            "policy": policy,
            "budget": budget,
            "clean_images": job.clean_images,
            "acc_drop": before.acc - after.acc,
            "asr": after.asr,
            "der": None if before.asr is None else der(before.acc, before.asr, after.acc, after.asr),
            "pruned": int((~mask).sum()),
        }
        if type(acting) is ONP:
            row["verdict"] = acting.verdict(env.reset(seed=0)[0])
        if policy in SIGNS:
            row["verdict"] = SIGNS[policy][1](victim)
        rows.append(row)
    env.close()
    return rows


def run_all(jobs: Sequence[Job], file: Path, processes: int) -> list[Row]:
    """What is missing of the jobs, in processes; all rows of the file, old and new."""
    fits()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    done = {(row["policy"], row["model"], row["budget"], row["clean_images"]) for row in rows}
    left = []
    for job in jobs:
        missing = {
            budget: [one for one in policies if (one, job.name, budget, job.clean_images) not in done]
            for budget, policies in job.policies.items()
        }
        if any(missing.values()):
            left.append(replace(job, policies=missing))
    with one_core_each(processes) as pool, file.open("a", encoding="utf-8") as records:
        for index, found in enumerate(pool.map(repair_all, left)):
            rows.extend(found)
            records.writelines(json.dumps(row) + "\n" for row in found)
            records.flush()
            print(f"{index + 1} of {len(left)}", flush=True)
    return rows


def by_policy(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows by policy and model."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["policy"], {})[row["model"]] = row
    return found


def infected_table(rows: Sequence[Row], against: str) -> list[str]:
    """Means over infected models, and the paired difference of the DER to one policy with its standard error."""
    policies = by_policy([row for row in rows if row["der"] is not None])
    other = policies.get(against, {})
    text = [
        f"| policy | models | ACC lost (points) | ASR | worst ASR | DER | pruned | DER less {against} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy, found in policies.items():
        mine = list(found.values())
        paired = [row["der"] - other[row["model"]]["der"] for row in mine if row["model"] in other]
        error = stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else 0.0
        text.append(
            f"| {policy} | {len(mine)} | {100 * mean(row['acc_drop'] for row in mine):.2f} | "
            f"{mean(row['asr'] for row in mine):.3f} | {max(row['asr'] for row in mine):.3f} | "
            f"{mean(row['der'] for row in mine):.3f} | {mean(row['pruned'] for row in mine):.1f} | "
            f"{mean(paired or [0]):+.3f} ± {error:.3f} |"
        )
    return text


def seeds_table(rows: Sequence[Row], against: str) -> list[str]:
    """Means over the seeds of a policy, with the standard deviation of the seeds' means.

    Seeds are a policy's last number (``mlp-0``); the paired difference of the DER is that of the means over seeds.
    """
    policies = by_policy([row for row in rows if row["der"] is not None])
    other = policies.get(against, {})
    groups: dict[str, list[dict[str, Row]]] = {}
    for policy, found in policies.items():
        if seeded := re.fullmatch(r"(\w+)-\d+(.*)", policy):
            groups.setdefault("".join(seeded.groups()), []).append(found)
    text = [f"| policy | seeds | ACC lost (points) | ASR | DER | DER less {against} |", "|---|---|---|---|---|---|"]
    for name, seeds in groups.items():
        if len(seeds) < 2:
            continue
        cells = []
        for key, by in (("acc_drop", 100), ("asr", 1), ("der", 1)):
            means = [by * mean(row[key] for row in found.values()) for found in seeds]
            cells.append(f"{mean(means):.3f} ± {stdev(means):.3f}")
        shared = set(other).intersection(*seeds)
        paired = [mean(found[model]["der"] for found in seeds) - other[model]["der"] for model in sorted(shared)]
        error = stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else 0.0
        text.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} | {mean(paired or [0]):+.3f} ± {error:.3f} |")
    return text


def clean_table(rows: Sequence[Row]) -> list[str]:
    """Means over clean models."""
    text = ["| policy | models | ACC lost (points) | untouched | pruned |", "|---|---|---|---|---|"]
    for policy, found in by_policy([row for row in rows if row["der"] is None]).items():
        mine = list(found.values())
        text.append(
            f"| {policy} | {len(mine)} | {100 * mean(row['acc_drop'] for row in mine):.2f} | "
            f"{mean(row['pruned'] == 0 for row in mine):.2f} | {mean(row['pruned'] for row in mine):.1f} |"
        )
    return text


def attack_table(rows: Sequence[Row]) -> list[str]:
    """Mean DER by attack."""
    text = [f"| policy | {' | '.join(ATTACKS)} | mean |", "|---|" + "---|" * (len(ATTACKS) + 1)]
    for policy, found in by_policy([row for row in rows if row["der"] is not None]).items():
        means = [
            mean(mine) if (mine := [row["der"] for row in found.values() if row["attack"] == attack]) else None
            for attack in ATTACKS
        ]
        there = [one for one in means if one is not None]
        cells = ["" if one is None else f"{one:.3f}" for one in (*means, mean(there))]
        text.append(f"| {policy} | {' | '.join(cells)} |")
    return text


def verdict_table(rows: Sequence[Row]) -> list[str]:
    """AUROC of the verdict or sign, clean against infected models."""
    text = ["| policy | AUROC |", "|---|---|"]
    for policy, found in by_policy([row for row in rows if "verdict" in row]).items():
        labels = [row["attack"] != "clean" for row in found.values()]
        if len(set(labels)) == 2:
            sign = f"{policy}: {SIGNS[policy][0]}" if policy in SIGNS else policy
            text.append(f"| {sign} | {roc_auc_score(labels, [row['verdict'] for row in found.values()]):.3f} |")
    return text
