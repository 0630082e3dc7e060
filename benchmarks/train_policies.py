"""Trains the policies of the tables, as ``backdoor-gym train`` does, with one look-ahead for all.

    backdoor-gym zoo build 'digits-train/*' --most 300
    backdoor-gym zoo build 'digits-val/*' --most 120
    python benchmarks/train_policies.py
    python benchmarks/train_policies.py --only mlp-0 mlp-1 mlp-2
    python benchmarks/train_policies.py --only ridge    # writes baselines/ridge.json
    python benchmarks/train_policies.py --thresholds

They go to ``benchmarks/policies``, and what the training said to ``results/train_<policy>.log``. What is there is left
alone, and what was begun goes on after its last rollout. The examples of the warm start are made once, for these policies
and for the ridge regression: ``policies/guide.npz``.
"""

import argparse
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from rivals import fit_ridge

import backdoor_gym
from backdoor_gym.agents import ONP, EncoderOptions, LookAhead
from backdoor_gym.agents.training import SCORE_SAMPLES, VERDICT_THRESHOLDS, checkpoint_of, train
from backdoor_gym.agents.validation import choose_threshold
from backdoor_gym.agents.warm_start import Example, examples
from backdoor_gym.writing import as_json

POLICIES = Path(__file__).parent / "policies"
RESULTS = Path(__file__).parent / "results"
ATTACKS = ("badnets", "blended", "sig", "wanet")
STEPS = 3_072
#: Chosen on ``digits-val`` with one policy. The inverted trigger, which all but the loss comes from, is one of BN statistics:
#: the policy without these looks at the loss alone.
LOOK = LookAhead()
LOSS_ALONE = LookAhead(danger_weight=0.0, done=0.0, patience=0, restore=0.0)
TRAINING = [f"digits-train/{seed}" for seed in range(300)]
VALIDATION = [f"digits-val/{seed}" for seed in range(30)]
#: The threshold is chosen on more: only their verdicts are asked for.
CALIBRATION = [f"digits-val/{seed}" for seed in range(120)]
#: All that compares the running statistics of batch normalisation with those of clean images.
BN_STATISTICS = (
    "kl", "log_variance_ratio", "mean_shift", "pull", "pull_now", "clean_pull_now",
    "suspected_danger", "suspected_drop", "shift", "inversion_error", "inversion_evidence",
)  # fmt: skip
#: The ridge regression that comes with the package; it has no threshold to choose.
RIDGE = "ridge"

MLP = EncoderOptions()
#: Name -> shape of the network, seed, attack that is left out.
WANTED: dict[str, tuple[EncoderOptions, int, str | None]] = {
    **{f"mlp-{seed}": (MLP, seed, None) for seed in range(3)},
    **{f"gnn-{seed}": (EncoderOptions(message_passing=True), seed, None) for seed in range(3)},
    "no-bn-statistics-0": (EncoderOptions(ignore=(*MLP.ignore, *BN_STATISTICS)), 0, None),
    **{f"without-{attack}": (MLP, 0, attack) for attack in ATTACKS},
}


def guide(models: list[str] = TRAINING, file: Path = POLICIES / "guide.npz") -> list[Example]:
    """The examples of some models, made once and kept in a file."""
    if not file.is_file():
        POLICIES.mkdir(exist_ok=True)
        arrays = {}
        made = examples(models, jobs=os.cpu_count() or 1, score_samples=SCORE_SAMPLES)
        for name, one in zip(models, made, strict=True):
            arrays |= {f"{name}:{key}": value for key, value in one.observation.items()}
            arrays |= {f"{name}:preference": one.preference, f"{name}:value": one.value}
        np.savez_compressed(file, **arrays)
    with np.load(file) as arrays:
        found: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
        for key in arrays.files:
            name, _, field = key.partition(":")
            found[name][field] = arrays[key]
    return [
        Example(preference=one.pop("preference"), value=one.pop("value"), observation=one) for one in found.values()
    ]


def train_all(wanted: list[str], steps: int = STEPS) -> None:
    """Train some of ``WANTED``."""
    school = guide()
    attack_of = {name: backdoor_gym.load_infected(name).facts["attack"] for name in TRAINING + CALIBRATION}
    for policy in wanted:
        if policy == RIDGE:
            fitted = as_json(asdict(fit_ridge(school)), indent=1)
            (Path(__file__).parents[1] / "baselines/ridge.json").write_text(f"{fitted}\n", encoding="utf-8")
            continue
        encoder, seed, left_out = WANTED[policy]
        out = POLICIES / f"{policy}.safetensors"
        if out.is_file() and not checkpoint_of(out).is_file():
            continue
        POLICIES.mkdir(exist_ok=True)
        if not checkpoint_of(out).is_file():
            _log(policy).unlink(missing_ok=True)
        train(
            [name for name in TRAINING if attack_of[name] != left_out],
            [name for name in VALIDATION if attack_of[name] != left_out],
            steps,
            out,
            seed=seed,
            encoder=encoder,
            look_ahead=LOSS_ALONE if set(BN_STATISTICS) & set(encoder.ignore) else LOOK,
            calibration=[name for name in CALIBRATION if attack_of[name] != left_out],
            guide=[one for name, one in zip(TRAINING, school, strict=True) if attack_of[name] != left_out],
            report=partial(_report, policy),
        )


def choose_thresholds(wanted: list[str]) -> None:
    """Choose the thresholds of trained policies anew, as training does: after what they observe has changed."""
    attack_of = {name: backdoor_gym.load_infected(name).facts["attack"] for name in CALIBRATION}
    env = gym.make(
        "backdoor_gym:BackdoorPrune-v0",
        infected=CALIBRATION,
        reward="oracle",
        score_samples=1,
        disable_env_checker=True,
    )
    for policy in wanted:
        out, left_out = POLICIES / f"{policy}.safetensors", WANTED[policy][2]
        onp = ONP.load(out)
        models = [name for name in CALIBRATION if attack_of[name] != left_out]
        _report(policy, "thresholds chosen anew:")
        for choice, (missed, needless) in choose_threshold(onp, env, models, VERDICT_THRESHOLDS).items():
            _report(policy, f"verdict below {choice}: {missed} backdoors missed, {needless} clean models repaired")
        onp.save(out)


def _log(policy: str) -> Path:
    return RESULTS / f"train_{policy}.log"


def _report(policy: str, line: str) -> None:
    print(f"{policy}: {line}", flush=True)
    with _log(policy).open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=[*WANTED, RIDGE], default=list(WANTED))
    parser.add_argument("--thresholds", action="store_true", help="choose the thresholds of trained policies anew")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.thresholds:
        choose_thresholds(arguments.only)
    else:
        train_all(arguments.only)


if __name__ == "__main__":
    main()
