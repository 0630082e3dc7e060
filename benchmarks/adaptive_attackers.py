"""What attackers who know a defence leave of each policy.

    python benchmarks/adaptive_attackers.py --recipes 8

Infected recipes from ``digits-test/900`` on (nothing was chosen with them), the attacks in turn, each trained as it is, by
an attacker who knows CLP (``UCLCPenalty``), and by one who knows the features from BN statistics (recalibrated on the clean
training images). Same seed, same data, same trigger. The defender has 200 clean images as they are, and a budget of two
points. Models go to ``infected/adaptive``, all else to ``results/adaptive_attackers``. Killed and called again, it goes on.
"""

import argparse
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from backdoor_gym import InfectedModel, benchmark, infect
from backdoor_gym.analysis.features import STATIC_FEATURES
from backdoor_gym.analysis.uclc_penalty import UCLCPenalty
from backdoor_gym.benchmarking.cells import Result
from backdoor_gym.benchmarking.resuming import Row, RowFile, run_tasks
from backdoor_gym.models import digits_family
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

RESULTS = Path(__file__).parent / "results" / "adaptive_attackers"
MODELS = Path("infected/adaptive")
FIRST = 900
ATTACKS = ("badnets", "blended", "sig", "wanet")
ATTACKERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "knows CLP": {"penalty": UCLCPenalty()},
    "knows BN": {"recalibrated": True},
}
POLICIES = {
    "CLP u = 3": "clp:3",
    "CLP u = auto": "clp:auto",
    "CLP, up to the budget": "clp",
    "BNP, up to the budget": "bnp",
    "Fine-Pruning, up to the budget": "fine-pruning",
    "ONP": "onp",
}


def seeds(recipes: int) -> list[int]:
    """So many recipes: the first one of each attack, then the second ones, and so on."""
    of_attack: dict[str, list[int]] = {attack: [] for attack in ATTACKS}
    drawn = count(FIRST)
    while min(map(len, of_attack.values())) * len(ATTACKS) < recipes:
        seed = next(drawn)
        of_attack.get(digits_family.recipe("digits-test", seed).attack, []).append(seed)
    return [seed for turn in zip(*of_attack.values(), strict=False) for seed in turn][:recipes]


def path_of(attacker: str, seed: int) -> Path:
    return MODELS / f"{attacker.replace(' ', '-').lower()}-{seed}.safetensors"


def make(seed: int) -> None:
    """The model of each attacker; the attempt is the first that gives an accurate plain network with a working backdoor."""
    if all(path_of(attacker, seed).exists() for attacker in ATTACKERS):
        return
    for attempt in range(digits_family.MAX_ATTEMPTS):
        drawn = digits_family.recipe("digits-test", seed, attempt)
        for attacker, known in ATTACKERS.items():
            model = infect(
                "digits",
                "small_cnn",
                drawn.attack,
                target=drawn.target,
                poison_rate=drawn.poison_rate,
                seed=drawn.seed,
                schedule=digits_family.SCHEDULE,
                architecture_options={"width": drawn.width, "blocks": drawn.blocks, "shape": drawn.shape},
                attack_options=drawn.attack_options,
                clean_images=digits_family.CLEAN_IMAGES,
                name=path_of(attacker, seed).stem,
                **known,
            )
            if attacker == "plain" and not (
                model.facts["acc"] >= digits_family.MIN_ACC and model.facts["asr"] >= digits_family.MIN_ASR
            ):
                break
            model.save(path_of(attacker, seed))
        else:
            return
    raise SystemExit(f"no attempt at seed {seed} gave a working backdoor")


def describe(name: str, attacker: str, file: RowFile) -> None:
    """What the defender's evidence says of a model, before any repair."""
    model = InfectedModel.load(MODELS / f"{name}.safetensors")
    prepared = PreparedModel(model, Preparation())
    evidence = {
        "largest_uclc_z": float(prepared.features[:, STATIC_FEATURES.index("uclc")].max()),
        "label_named": prepared.evidence.target == model.target,
    }
    file.add(model=name, attacker=attacker, **model.facts, neurons=len(prepared), **evidence)


def table(rows: list[Row], results: list[Result]) -> str:
    attacker_of = {row["model"]: row["attacker"] for row in rows}
    lines = [
        "| attacker | models | ACC | ASR | largest UCLC z | label named |",
        "|---|---|---|---|---|---|",
    ]
    for attacker in ATTACKERS:
        own = [row for row in rows if row["attacker"] == attacker]
        acc, asr, z = (mean(row[key] for row in own) for key in ("acc", "asr", "largest_uclc_z"))
        named = sum(row["label_named"] for row in own)
        lines.append(f"| {attacker} | {len(own)} | {acc:.3f} | {asr:.3f} | {z:.1f} | {named} |")
    lines += ["", "| policy | " + " | ".join(f"{attacker}: ACC lost, ASR, DER" for attacker in ATTACKERS) + " |"]
    lines.append("|---" * (1 + len(ATTACKERS)) + "|")
    for policy in POLICIES:
        cells = []
        for attacker in ATTACKERS:
            own = [
                result
                for result in results
                if (result.policy, attacker_of[Path(result.model).stem]) == (policy, attacker)
            ]
            lost = 100 * mean(result.acc_lost or 0.0 for result in own)
            asr, der = (mean(getattr(result, key) for result in own) for key in ("asr", "der"))
            cells.append(f"{lost:.1f}, {asr:.3f}, **{der:.3f}**")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=int, default=8)
    torch.set_num_threads(1)
    chosen = seeds(parser.parse_args().recipes)
    for seed in chosen:
        make(seed)
    paths = {path_of(attacker, seed): attacker for seed in chosen for attacker in ATTACKERS}
    file = RowFile(RESULTS / "models.jsonl", ("model", "attacker"))
    run_tasks(describe, file.missing((path.stem, attacker) for path, attacker in paths.items()), file)
    done = benchmark(list(paths), POLICIES, [0.02], out=RESULTS, jobs=1, progress=True)
    if done.failed:
        raise SystemExit(done.failed[0].error)
    text = table([row for row in file.rows() if row["model"] in {path.stem for path in paths}], done.results)
    (RESULTS / "by_attacker.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
