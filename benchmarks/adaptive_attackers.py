"""What attackers who know a defence leave of each policy.

    python benchmarks/adaptive_attackers.py --recipes 8

Infected recipes from ``digits-test/900`` on (nothing was chosen with them), the attacks in turn, each trained as it is, by
an attacker who knows CLP (``UCLCPenalty``), and by one who knows the features from BN statistics (recalibrated on the clean
training images). Same seed, same data, same trigger. The defender has 200 clean images as they are, and a budget of two
points. Models go to ``infected/adaptive``, repairs to ``results/adaptive_attackers.jsonl``, what the models are to
``results/adaptive_attackers.json``, the tables to ``results/adaptive_attackers.md``. Killed and called again, it goes on.
"""

import argparse
import json
from dataclasses import asdict
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from backdoor_gym import InfectedModel, benchmark, infect
from backdoor_gym.analysis.uclc_penalty import UCLCPenalty
from backdoor_gym.benchmarking.cells import Result
from backdoor_gym.models import family
from backdoor_gym.session.prepared_model import Victim, VictimOptions

RESULTS = Path(__file__).parent / "results"
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
    found: dict[str, list[int]] = {attack: [] for attack in ATTACKS}
    for seed in count(FIRST):
        if sum(map(len, found.values())) >= recipes and min(map(len, found.values())) >= recipes // len(ATTACKS) + 1:
            break
        found.get(family.recipe("digits-test", seed).attack, []).append(seed)
    return [seed for turn in zip(*found.values(), strict=False) for seed in turn][:recipes]


def path_of(attacker: str, seed: int) -> Path:
    return MODELS / f"{attacker.replace(' ', '-').lower()}-{seed}.safetensors"


def make(seed: int) -> None:
    """The model of each attacker; the attempt is the first that gives an accurate plain network with a working backdoor."""
    if all(path_of(attacker, seed).exists() for attacker in ATTACKERS):
        return
    for attempt in range(family.MAX_ATTEMPTS):
        drawn = family.recipe("digits-test", seed, attempt)
        for attacker, known in ATTACKERS.items():
            model = infect(
                "digits",
                "small_cnn",
                drawn.attack,
                target=drawn.target,
                poison_rate=drawn.poison_rate,
                seed=drawn.seed,
                schedule=family.SCHEDULE,
                architecture_options={"width": drawn.width, "blocks": drawn.blocks, "shape": drawn.shape},
                attack_options=drawn.attack_options,
                clean_images=family.CLEAN_IMAGES,
                name=path_of(attacker, seed).stem,
                **known,
            )
            if attacker == "plain" and not (
                model.facts["acc"] >= family.MIN_ACC and model.facts["asr"] >= family.MIN_ASR
            ):
                break
            model.save(path_of(attacker, seed))
        else:
            return
    raise SystemExit(f"no attempt at seed {seed} gave a working backdoor")


def describe(attacker: str, seed: int) -> dict[str, Any]:
    """What the defender's evidence says of a model, before any repair."""
    model = InfectedModel.load(path_of(attacker, seed))
    victim = Victim(model, VictimOptions())
    return {
        "model": model.name,
        "attacker": attacker,
        **model.facts,
        "neurons": len(victim),
        "largest_uclc_z": float(victim.uclc_scores.max()),
        "label_named": victim.suspected is not None and victim.suspected.target == model.target,
    }


def table(rows: list[dict[str, Any]], results: list[Result]) -> str:
    attacker_of = {row["model"]: row["attacker"] for row in rows}
    lines = [
        "| attacker | models | ACC | ASR | largest UCLC z | label named |",
        "|---|---|---|---|---|---|",
    ]
    for attacker in ATTACKERS:
        mine = [row for row in rows if row["attacker"] == attacker]
        acc, asr, z = (mean(row[key] for row in mine) for key in ("acc", "asr", "largest_uclc_z"))
        named = sum(row["label_named"] for row in mine)
        lines.append(f"| {attacker} | {len(mine)} | {acc:.3f} | {asr:.3f} | {z:.1f} | {named} |")
    lines += ["", "| policy | " + " | ".join(f"{attacker}: ACC lost, ASR, DER" for attacker in ATTACKERS) + " |"]
    lines.append("|---" * (1 + len(ATTACKERS)) + "|")
    for policy in POLICIES:
        cells = []
        for attacker in ATTACKERS:
            mine = [
                result
                for result in results
                if result.policy == policy and attacker_of[Path(result.model).stem] == attacker
            ]
            lost = 100 * mean(result.acc_lost or 0.0 for result in mine)
            asr, der = (mean(getattr(result, key) for result in mine) for key in ("asr", "der"))
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
    described = RESULTS / "adaptive_attackers.json"
    known = (
        {row["model"]: row for row in json.loads(described.read_text(encoding="utf-8"))} if described.exists() else {}
    )
    wanted = [(attacker, seed) for seed in chosen for attacker in ATTACKERS]
    rows = [known.get(path_of(attacker, seed).stem) or describe(attacker, seed) for attacker, seed in wanted]
    described.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    done = benchmark(
        [path_of(attacker, seed) for attacker, seed in wanted],
        POLICIES,
        [0.02],
        out=MODELS / "benchmark",
        jobs=1,
        progress=True,
    )
    if done.failed:
        raise SystemExit(done.failed[0].error)
    (RESULTS / "adaptive_attackers.jsonl").write_text(
        "".join(json.dumps(asdict(result)) + "\n" for result in done.results), encoding="utf-8"
    )
    text = table(rows, done.results)
    (RESULTS / "adaptive_attackers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
