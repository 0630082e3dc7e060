"""What training on networks of three sizes costs: seconds and bytes, and what they are proportional to.

    python benchmarks/scaling.py

A ResNet-18 on digits, and ResNet-18 of width 16 and 64 on CIFAR-10 images, 200 of each but 48 for the widest, whose weights
are random: what it costs does not depend on them. One JSON line a network on standard output, all in
``results/scaling.json``; what follows from it is in ``docs/scaling.md``.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import backdoor_gym
from backdoor_gym.agents import GraphRolloutBuffer
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.networks import build

HERE = Path(__file__).parent
ROUNDS = 3
#: Two of them are followed by derivatives taken anew, as usual.
PRUNES = 8
IMAGES, IMAGES_OF_THE_WIDEST = 200, 48


def wide(images: int) -> InfectedModel:
    """ResNet-18 as it is usually used, with the clean images of another model."""
    torch.manual_seed(0)
    known = backdoor_gym.load_infected(str(HERE / "models" / "resnet18-badnets.safetensors"))
    network = build("resnet18", num_classes=10, in_channels=3, width=64).eval()
    return InfectedModel.from_module(
        network, (known.clean.images[:images], known.clean.labels[:images]), name="resnet18-64"
    )


def seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median of the time that something takes."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def measure(infected: InfectedModel | str, images: int) -> dict[str, Any]:
    env = BackdoorPruneEnv(infected, accuracy_budget=None, score_samples=0, clean_samples=images)
    start = time.perf_counter()
    env.reset(seed=0)
    prepared = time.perf_counter() - start
    victim, random = env.session.victim, np.random.default_rng(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        victim.model.network(victim.clean.images[:1])
    everything = victim.clean.images.contiguous(memory_format=torch.channels_last)
    units = random.permutation(len(victim))[:PRUNES]
    with torch.no_grad():
        forward = seconds(lambda: victim.model.network(everything))
    evaluation = [seconds(lambda unit=unit: env.session.peek([int(unit)]), 1) for unit in units]
    env.reset(seed=0)
    steps = [seconds(lambda unit=unit: env.step(int(unit)), 1) for unit in units]
    buffer = GraphRolloutBuffer(64, env.observation_space, env.action_space, "cpu", n_envs=1)
    stored = [
        *buffer.observations.values(),
        *(value for value in vars(buffer).values() if isinstance(value, np.ndarray)),
    ]
    observation = env.observe()
    kept = {id(value): value.nbytes for network in env.session.masked._networks() for value in network._whole.values()}
    return {
        "network": victim.name,
        "neurons": len(victim),
        "images": len(victim.clean),
        "mmacs_an_image": counter.get_total_flops() / 2e6,
        "prepare_s": prepared,
        "forward_s": forward,
        "evaluation_s": float(np.mean(evaluation)),
        "slopes_s": seconds(lambda: victim.slopes(env.session.state.pruned), 3),
        "step_s": float(np.mean(steps)),
        "observation_bytes": sum(array.nbytes for array in observation.values()),
        "rollout_bytes_a_step": round(sum(array.nbytes for array in stored) / 64),
        "graph_bytes": observation["edges"].nbytes + observation["edge_links"].nbytes + len(victim) * 40,
        "kept_activations_bytes": sum(kept.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for infected, images in (
        ("digits-badnets", IMAGES),
        (str(HERE / "models" / "resnet18-badnets.safetensors"), IMAGES),
        (wide(IMAGES_OF_THE_WIDEST), IMAGES_OF_THE_WIDEST),
    ):
        rows.append({**measure(infected, images), "threads": arguments.threads})
        print(json.dumps(rows[-1]), flush=True)
    (HERE / "results" / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
