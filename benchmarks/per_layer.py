"""One agent a layer against one agent for the whole network: trained on the same models, tested on the same models.

    backdoor-gym zoo build 'digits-train/*' --most 60
    backdoor-gym zoo build 'digits-val/*' --most 20
    python benchmarks/per_layer.py

Both begin with the same examples of the same 60 models and then learn by reinforcement from about as many tried prunes, each
of which is one evaluation of a network; the best policy on the same 20 models is kept. Then both repair the same
``digits-test`` models, from 600 on, as they act by themselves, without look-ahead: budget of two points, at most 100 prunes
tried. Three training seeds. Policies and what the training said go to ``policies/per_layer`` and
``results/train_layers-*.log``, one line a repair to ``results/per_layer.jsonl``, the table to ``results/per_layer.md``. Killed and
called again it goes on.
"""

import argparse
import json
from functools import partial
from itertools import count, islice
from typing import Any

import gymnasium as gym
import torch
from comparison import clean_table, infected_table, seeds_table
from train_policies import MLP, RESULTS, guide
from train_policies import POLICIES as OTHERS

import backdoor_gym
from backdoor_gym.agents.layer_training import train_layers
from backdoor_gym.agents.training import checkpoint_of, train
from backdoor_gym.baselines.policy import run_episode
from backdoor_gym.masking.export import write_mask
from backdoor_gym.metrics import der
from backdoor_gym.models.family import recipe
from backdoor_gym.policies import make_policy
from backdoor_gym.processes import one_core_each

TRAINING = [f"digits-train/{seed}" for seed in range(60)]
VALIDATION = [f"digits-val/{seed}" for seed in range(20)]
#: Not beside the others, which the other tables take their rows from.
POLICIES = OTHERS / "per_layer"
SEEDS = (0, 1, 2)
#: Steps of agents, and of the single agent, in rounds of 768: not fewer tried prunes (the logs say how many the others made).
LAYER_STEPS, STEPS = 7_040, 2_304
ROWS = RESULTS / "per_layer.jsonl"
BUDGET, MAX_STEPS = 0.02, 100
#: First of the test models; no other table has used them.
FIRST = 600


def learn(policy: str) -> None:
    """Train one of ``layers-SEED`` and ``whole-SEED``, if it is not there."""
    torch.set_num_threads(1)
    kind, _, seed = policy.partition("-")
    out = POLICIES / f"{policy}.safetensors"
    if out.is_file() and not checkpoint_of(out).is_file():
        return
    POLICIES.mkdir(exist_ok=True)
    school = guide(TRAINING, OTHERS / "guide_60.npz")
    shared: dict[str, Any] = {"seed": int(seed), "guide": school, "report": partial(_report, policy)}
    if kind == "layers":
        train_layers(TRAINING, VALIDATION, LAYER_STEPS, out, **shared)
    else:
        train(TRAINING, VALIDATION, STEPS, out, encoder=MLP, looks=(), **shared)


def _report(policy: str, line: str) -> None:
    print(f"{policy}: {line}", flush=True)
    with (RESULTS / f"train_{policy}.log").open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def repair_all(job: tuple[str, list[str]]) -> list[dict[str, Any]]:
    """One model, by several policies."""
    name, wanted = job
    model = backdoor_gym.load_infected(name)
    env = gym.make(
        "backdoor_gym:BackdoorPrune-v0",
        infected=name,
        accuracy_budget=BUDGET,
        max_steps=MAX_STEPS,
        score_samples=0,
        disable_env_checker=True,
    ).unwrapped
    before, rows = model.evaluate(), []
    for policy in wanted:
        observation, _ = env.reset(seed=0)
        run_episode(make_policy(str(POLICIES / f"{policy}.safetensors"), env, {}), env, observation)
        mask = env.victim.neuron_mask(env.pruned)
        after = model.evaluate(write_mask(model.network, env.victim.neurons, mask))
        known = before.asr is not None
        rows.append(
            {
                "model": name,
                "attack": model.facts["attack"],
                "policy": policy,
                "acc_drop": before.acc - after.acc,
                "asr": after.asr,
                "der": der(before.acc, before.asr, after.acc, after.asr) if known else None,
                "pruned": int((~mask).sum()),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--clean", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    policies = [f"{kind}-{seed}" for seed in arguments.seeds for kind in ("layers", "whole")]
    guide(TRAINING, OTHERS / "guide_60.npz")
    with one_core_each(arguments.jobs) as pool:
        list(pool.map(learn, policies))
    attacks = ((f"digits-test/{seed}", recipe("digits-test", seed).attack) for seed in count(FIRST))
    infected = list(islice((name for name, attack in attacks if attack != "clean"), arguments.models))
    attacks = ((f"digits-test/{seed}", recipe("digits-test", seed).attack) for seed in count(FIRST))
    clean = list(islice((name for name, attack in attacks if attack == "clean"), arguments.clean))
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.is_file() else []
    done = {(row["model"], row["policy"]) for row in rows}
    missing = [(name, [one for one in policies if (name, one) not in done]) for name in (*infected, *clean)]
    with one_core_each(arguments.jobs) as pool, ROWS.open("a", encoding="utf-8") as file:
        for found in pool.map(repair_all, [job for job in missing if job[1]]):
            rows.extend(found)
            file.writelines(json.dumps(row) + "\n" for row in found)
            file.flush()
    text = ["Infected models:\n", *infected_table(rows, "whole-0"), "\nSeeds:\n", *seeds_table(rows, "whole-0")]
    text += ["\nClean models:\n", *clean_table(rows)]
    (RESULTS / "per_layer.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
