"""ONP as in its paper: learning on each infected network alone, from clean images, against rules and a greedy search.

    backdoor-gym zoo build 'digits-test/6[0-9][0-9]'
    python benchmarks/per_model.py --jobs 2

The first 20 infected ``digits-test`` models from 600 on, budget of two points, at most 60 prunes, the reward that needs no trigger,
three seeds of the policies that have any. *ONP alone* begins with a warm start on what the environment shows of that
network; *ONP, tuned* from the policy that comes with the package. *Greedy* makes the prune of the largest reward while
there is one, of the 60 candidates whose derivatives promise most. Nothing is chosen by ASR. Killed and called again it goes
on: one line a repair in ``results/per_model.jsonl``; the table goes to ``results/per_model.md``.
"""

import argparse
import json
from itertools import count, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gymnasium as gym
import numpy as np
from onp_digits import FIRST

import backdoor_gym
from backdoor_gym.agents import ONP
from backdoor_gym.agents.finetuning import learn_alone
from backdoor_gym.baselines import CLP, RandomPolicy
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.reward import Transition, accuracy_reward
from backdoor_gym.masking.export import write_mask
from backdoor_gym.metrics import der
from backdoor_gym.models.family import recipe
from backdoor_gym.policies.contract import finish
from backdoor_gym.processes import one_core_each

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "per_model.jsonl"
BUDGET, MAX_STEPS, CANDIDATES = 0.02, 60, 60
SEEDS = (0, 1, 2)
STEPS = {"ONP alone": 512, "ONP, tuned": 256}
POLICIES = ("CLP u=3", "CLP auto", "random", "greedy", "ONP, untuned", *STEPS)
SEEDED = ("random", *STEPS)


class Greedy:
    """The prune of the largest reward, while there is one above its cost."""

    def __init__(self, env: BackdoorPruneEnv) -> None:
        self.env = env

    def predict(self, observation: dict[str, np.ndarray], *_: Any, **__: Any) -> tuple[int, None]:
        env, victim = self.env, self.env.session.victim
        slopes = victim.slopes(env.session.state.pruned)
        promise = slopes.pull / max(slopes.pull.std(), 1e-12) - np.maximum(slopes.harm, 0) / max(
            slopes.harm.std(), 1e-12
        )
        legal = env.action_masks()[:-1][: len(victim)]
        best, action = env.step_cost, env.stop_action
        for unit in np.argsort(-np.where(legal, promise, -np.inf))[: min(CANDIDATES, int(legal.sum()))]:
            after = env.session.peek([int(unit)])
            if observation["globals"][0] + observation["globals"][1] - after.acc > BUDGET + 1e-6:
                continue
            reward = accuracy_reward(Transition(victim, int(unit), env.session.figures, after))
            if reward > best:
                best, action = reward, int(unit)
        return action, None


def make(policy: str, env: gym.Env[Any, Any], seed: int) -> Any:
    alone = env.unwrapped
    assert isinstance(alone, BackdoorPruneEnv)
    if policy == "CLP u=3":
        return CLP(3.0)
    if policy == "CLP auto":
        return CLP("auto", env, BUDGET)
    if policy == "random":
        return RandomPolicy(seed)
    if policy == "greedy":
        return Greedy(alone)
    if policy == "ONP alone":
        return learn_alone(ONP(seed=seed), alone, STEPS[policy], warm=True)
    onp = ONP.load("pretrained", env, seed=seed)
    return learn_alone(onp, alone, STEPS[policy]) if policy in STEPS else onp


def repair_one(job: tuple[str, str, int]) -> dict[str, Any]:
    name, policy, seed = job
    model = backdoor_gym.load_infected(name)
    env = gym.make(
        "backdoor_gym:BackdoorPrune-v0",
        infected=name,
        accuracy_budget=BUDGET,
        max_steps=MAX_STEPS,
        score_samples=0,
        disable_env_checker=True,
    )
    observation, _ = env.reset(seed=seed)
    acting = make(policy, env, seed)
    observation, _ = env.reset(seed=seed)
    done, total = False, 0.0
    state, start = None, np.ones(1, dtype=bool)
    while not done:
        action, state = acting.predict(observation, state, start, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(int(action))
        done, start, total = terminated or truncated, np.zeros(1, dtype=bool), total + float(reward)
    alone = env.unwrapped
    total += finish(acting, env)
    before = model.evaluate()
    mask = alone.session.victim.neuron_mask(alone.session.state.pruned)
    after = model.evaluate(write_mask(model.network, alone.session.victim.neurons, mask))
    return {
        "model": name,
        "attack": model.facts["attack"],
        "policy": policy,
        "seed": seed,
        "return": total,
        "acc_drop": before.acc - after.acc,
        "asr": after.asr,
        "der": der(before.acc, before.asr, after.acc, after.asr),
        "pruned": int((~mask).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    infected = (f"digits-test/{seed}" for seed in count(FIRST) if recipe("digits-test", seed).attack != "clean")
    names = list(islice(infected, arguments.models))
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.is_file() else []
    done = {(row["model"], row["policy"], row["seed"]) for row in rows}
    jobs = [
        (name, policy, seed)
        for seed in SEEDS
        for policy in arguments.only
        for name in names
        if (policy in SEEDED or seed == 0) and (name, policy, seed) not in done
    ]
    with one_core_each(arguments.jobs) as pool, ROWS.open("a", encoding="utf-8") as file:
        for index, row in enumerate(pool.map(repair_one, jobs)):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{index + 1} of {len(jobs)}: {row['policy']} {row['model']} {row['der']:.3f}", flush=True)
    (RESULTS / "per_model.md").write_text(table(rows), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Means over models and seeds; the spread is that of the means of the seeds."""
    text = [
        "| policy | seeds | return | ACC lost (points) | ASR | DER | pruned | DER less greedy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    greedy = {row["model"]: row["der"] for row in rows if row["policy"] == "greedy"}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        seeds = sorted({row["seed"] for row in mine})
        by_seed = [mean(row["der"] for row in mine if row["seed"] == seed) for seed in seeds]
        spread = f" ± {stdev(by_seed):.3f}" if len(by_seed) > 1 else ""
        by_model = [
            mean(row["der"] for row in mine if row["model"] == model) - greedy[model]
            for model in sorted({row["model"] for row in mine} & set(greedy))
        ]
        error = stdev(by_model) / len(by_model) ** 0.5 if len(by_model) > 1 else 0.0
        text.append(
            f"| {policy} | {len(seeds)} | {mean(row['return'] for row in mine):.3f} "
            f"| {100 * mean(row['acc_drop'] for row in mine):.2f} | {mean(row['asr'] for row in mine):.3f} "
            f"| {mean(by_seed):.3f}{spread} | {mean(row['pruned'] for row in mine):.1f} "
            f"| {mean(by_model or [0]):+.3f} ± {error:.3f} |"
        )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
