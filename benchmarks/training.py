"""Trains what comes with the package and what the tables are about.

    backdoor-gym zoo build 'digits-train/*' --most 300
    backdoor-gym zoo build 'digits-val/*' --most 30
    python benchmarks/training.py policies                       # into policies/, logs into results/train_<policy>.log
    python benchmarks/training.py policies --only mlp-0 mlp-1 mlp-2
    python benchmarks/training.py maskable-ppo --steps 6000 --seeds 3
    python benchmarks/training.py embedded                       # the infected models that come with the package

A policy that is there is left alone, one that was begun goes on after its last rollout. The examples of the warm start are made
once, for policies and ridge regressions: ``policies/guide.npz``. Rounding differs between kinds of processors, so what is trained
elsewhere is an equal one, not the same to the last bit.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import backdoor_gym
from backdoor_gym.agents import EncoderOptions, LookAhead
from backdoor_gym.agents.training import SCORE_SAMPLES, checkpoint_of, train
from backdoor_gym.agents.warm_start import Example, examples
from backdoor_gym.baselines import RandomPolicy, Ridge
from backdoor_gym.models.training import Schedule
from backdoor_gym.writing import as_json

HERE = Path(__file__).parent
POLICIES, RESULTS, EMBEDDED = HERE / "policies", HERE / "results", Path(backdoor_gym.__file__).parent / "embedded"
ATTACKS = ("badnets", "blended", "sig", "wanet")
STEPS = 3_072
#: Chosen on ``digits-val`` with one policy. The inverted trigger, which all but the loss comes from, is one of BN statistics:
#: the policy without these looks at the loss alone.
LOOK = LookAhead()
LOSS_ALONE = LookAhead(danger_weight=0.0, done=0.0, patience=0, restore=False)
TRAINING = [f"digits-train/{seed}" for seed in range(300)]
VALIDATION = [f"digits-val/{seed}" for seed in range(30)]
#: All that compares the running statistics of batch normalisation with those of clean images.
BN_STATISTICS = (
    "kl", "log_variance_ratio", "mean_shift", "pull", "pull_now", "clean_pull_now",
    "suspected_danger", "suspected_drop", "shift", "inversion_error", "inversion_evidence",
)  # fmt: skip
#: The ridge regression that comes with the package.
RIDGE = "ridge"
MLP = EncoderOptions()
#: Name -> shape of the network, seed, attack that is left out.
SHAPES: dict[str, tuple[EncoderOptions, int, str | None]] = {
    **{f"mlp-{seed}": (MLP, seed, None) for seed in range(3)},
    **{f"gnn-{seed}": (EncoderOptions(message_passing=True), seed, None) for seed in range(3)},
    "no-bn-statistics-0": (EncoderOptions(ignore=(*MLP.ignore, *BN_STATISTICS)), 0, None),
    **{f"without-{attack}": (MLP, 0, attack) for attack in ATTACKS},
}
#: MaskablePPO: most prunes of an episode, episodes of a mean.
MAX_STEPS, EPISODES = 40, 20
#: Of each embedded model: attack, target and seed. That of BadNets was looked for among twelve.
MODELS = (("badnets", 3, 3), ("blended", 7, 0), ("clean", 0, 0))
SCHEDULE = Schedule(epochs=40, batch_size=64, learning_rate=0.2, weight_decay=0.01, augment=False)


def guide(models: list[str] = TRAINING, file: Path = POLICIES / "guide.npz") -> list[Example]:
    """The examples of some models, made once and kept in a file."""
    if not file.is_file():
        arrays = {}
        for name, example in zip(
            models, examples(models, jobs=os.cpu_count() or 1, score_samples=SCORE_SAMPLES), strict=True
        ):
            arrays |= {f"{name}:{key}": value for key, value in example.observation.items()}
            arrays |= {f"{name}:preference": example.preference, f"{name}:value": example.value}
        np.savez_compressed(file, **arrays)
    with np.load(file) as arrays:
        fields: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
        for key in arrays.files:
            name, _, field = key.partition(":")
            fields[name][field] = arrays[key]
    return [
        Example(preference=own.pop("preference"), value=own.pop("value"), observation=own) for own in fields.values()
    ]


def fit_ridge(school: Sequence[Example]) -> Ridge:
    """Fitted on what ONP's warm start is fitted on: the same states of the same models, with the same preferences."""
    return Ridge.fit(
        state for example in school for state in zip(example.observation["nodes"], example.preference, strict=True)
    )


def attacks_of(models: list[str]) -> dict[str, str]:
    """The attack of each model."""
    return {name: backdoor_gym.load_infected(name).facts["attack"] for name in models}


def train_policies(names: list[str]) -> None:
    """Train some of ``SHAPES`` as ``backdoor-gym train`` does, with one look-ahead for all."""
    if RIDGE in names:
        text = as_json(asdict(fit_ridge(guide())), indent=1)
        (HERE.parent / "baselines/ridge.json").write_text(f"{text}\n", encoding="utf-8")
    shaped = [name for name in names if name != RIDGE]
    missing = [name for name in shaped if not (POLICIES / f"{name}.safetensors").is_file() or _begun(name)]
    if not missing:
        return
    school, attack_of = guide(), attacks_of(TRAINING + VALIDATION)
    for policy in missing:
        encoder, seed, left_out = SHAPES[policy]
        if not _begun(policy):
            _log(policy).unlink(missing_ok=True)
        blind = set(BN_STATISTICS) & set(encoder.ignore)
        train(
            [name for name in TRAINING if attack_of[name] != left_out],
            [name for name in VALIDATION if attack_of[name] != left_out],
            STEPS,
            POLICIES / f"{policy}.safetensors",
            seed=seed,
            encoder=encoder,
            look_ahead=LOSS_ALONE if blind else LOOK,
            guide=[example for name, example in zip(TRAINING, school, strict=True) if attack_of[name] != left_out],
            report=partial(_report, policy),
        )


def _begun(policy: str) -> bool:
    """Whether its training was interrupted."""
    return checkpoint_of(POLICIES / f"{policy}.safetensors").is_file()


def _log(policy: str) -> Path:
    return RESULTS / f"train_{policy}.log"


def _report(policy: str, line: str) -> None:
    print(f"{policy}: {line}", flush=True)
    with _log(policy).open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def train_embedded() -> None:
    """Make the embedded models; remove a file to make it again."""
    for attack, target, seed in MODELS:
        path = EMBEDDED / f"digits-{attack}.safetensors"
        if path.exists():
            continue
        shape: dict[str, Any] = {"architecture_options": {"width": 8}, "schedule": SCHEDULE, "clean_images": 200}
        model = backdoor_gym.infect(
            "digits", "resnet18", attack, target=target, seed=seed, half=True, progress=True, name=path.stem, **shape
        )
        model.save(path, half=True)
        print(path.name, model.facts["acc"], model.facts["asr"])


def make_env() -> gym.Env[Any, Any]:
    """The embedded model with the default reward and budget."""
    return gym.make("BackdoorPrune-v0", max_steps=MAX_STEPS, score_samples=0)


def train_maskable_ppo(steps: int, seeds: int) -> None:
    """MaskablePPO of sb3-contrib, unchanged, against RandomPolicy; returns are means over episodes, figures those of ``repair``."""
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.evaluation import evaluate_policy
    from stable_baselines3.common import evaluation
    from stable_baselines3.common.vec_env import DummyVecEnv

    rows = []
    for seed in range(seeds):
        start = time.perf_counter()
        model = MaskablePPO(
            "MultiInputPolicy",
            DummyVecEnv([make_env] * 4),
            n_steps=128,
            batch_size=128,
            n_epochs=8,
            learning_rate=1e-3,
            gamma=0.5,  # a prune is paid at once; with gamma=1 the same number of steps only teaches to stop early
            gae_lambda=0.9,
            ent_coef=0.01,
            seed=seed,
        ).learn(steps)
        seconds = time.perf_counter() - start
        asked = {"return_episode_rewards": True, "warn": False}
        learned, _ = evaluate_policy(model, make_env(), EPISODES, deterministic=False, **asked)
        random, _ = evaluation.evaluate_policy(RandomPolicy(seed), make_env(), EPISODES, **asked)
        for name, policy, returns in (("MaskablePPO", model, learned), ("RandomPolicy", RandomPolicy(seed), random)):
            result = backdoor_gym.repair("digits-badnets", policy, accuracy_budget=0.02, max_steps=MAX_STEPS)
            figures = {
                "acc": result.after.acc,
                "asr": result.after.asr,
                "der": result.der,
                "pruned": len(result.pruned),
            }
            trained = {"seconds": seconds} if name == "MaskablePPO" else {}
            rows.append({"seed": seed, "policy": name, **trained, "return": mean(returns), **figures})
            print(json.dumps(rows[-1]), flush=True)
    summary: dict[str, dict[str, Any]] = {}
    for name in ("MaskablePPO", "RandomPolicy"):
        for key in ("return", "acc", "asr", "der", "pruned"):
            values = [row[key] for row in rows if row["policy"] == name]
            spread = stdev(values) if len(values) > 1 else None
            summary.setdefault(name, {})[key] = {"mean": mean(values), "std": spread}
    record = {"steps": steps, "summary": summary, "runs": rows}
    (RESULTS / "maskable_ppo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("policies", "maskable-ppo", "embedded"))
    parser.add_argument("--only", nargs="*", choices=[*SHAPES, RIDGE], default=list(SHAPES), help="policies")
    parser.add_argument("--steps", type=int, default=6_000, help="of MaskablePPO")
    parser.add_argument("--seeds", type=int, default=3, help="of MaskablePPO")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "policies":
        train_policies(arguments.only)
    elif arguments.what == "embedded":
        train_embedded()
    else:
        train_maskable_ppo(arguments.steps, arguments.seeds)


if __name__ == "__main__":
    main()
