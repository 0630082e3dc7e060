"""How fast everything is that repairs and trainings consist of, against what a user would write, and against the arithmetic.

    python benchmarks/speed.py

On a digits network, and on ResNet-18 of width 16 and 64 with 500 CIFAR-10 images (``BACKDOOR_GYM_DATA`` names their folder).
The widest one has random weights whose BN statistics were set by a pass, and a pattern in place of its inverted trigger:
what it costs does not depend on them. Ours and the rival's work take turns in one run, and ratios are medians over the rounds.
Each part of a network runs in a process of its own and is written when it is done (``results/speed.part.json``); called again
after an interruption, only what is missing is measured. The whole goes to ``results/speed.json``.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from speed_rivals import (
    forward_backward,
    gemm_rate,
    masked_accuracy,
    multiply_adds,
    one_svd_a_channel,
    seconds,
)
from torch import nn

import backdoor_gym
from backdoor_gym import repair
from backdoor_gym.agents import ONP
from backdoor_gym.agents.onp import PPO
from backdoor_gym.agents.vec_env import ThreadedVecEnv
from backdoor_gym.analysis.bn_evidence import Correction, Reading
from backdoor_gym.analysis.features import neuron_features, standardise
from backdoor_gym.analysis.neuron_graph import neuron_graph
from backdoor_gym.analysis.suspected_target import SuspectedTarget
from backdoor_gym.analysis.trigger_inversion import InvertedTrigger
from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.vector import BackdoorPruneVectorEnv
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.networks import build
from backdoor_gym.session.masked_model import MaskedVictim
from backdoor_gym.session.prepared_model import Victim

HERE = Path(__file__).parent
RESULT, PART = (HERE / "results" / name for name in ("speed.json", "speed.part.json"))
DIGITS, NARROW, WIDE = "digits-train/140", "resnet18-16", "resnet18-64"
IMAGES = {DIGITS: 200, NARROW: 500, WIDE: 500}
#: Prunes of an episode, and episodes.
STEPS = {DIGITS: 24, NARROW: 16, WIDE: 8}
ROUNDS = {DIGITS: 7, NARROW: 5, WIDE: 3}
U = 3.0

Found = dict[str, Any]


def model_of(network: str) -> InfectedModel:
    """One of the three."""
    if network == DIGITS:
        return backdoor_gym.load_infected(DIGITS)
    narrow = backdoor_gym.load_infected(str(HERE / "models" / "resnet18-badnets.safetensors"))
    if network == NARROW:
        return narrow
    torch.manual_seed(0)
    wide = build("resnet18", num_classes=10, in_channels=3, width=64)
    for module in wide.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics are those of the next batch
    with torch.no_grad():
        wide.train()(narrow.clean.images[:100])
    return InfectedModel.from_module(wide.eval(), (narrow.clean.images, narrow.clean.labels), name=WIDE)


def environment(network: str, **options: Any) -> BackdoorPruneEnv:
    """An environment of it, an episode begun."""
    model = model_of(network)
    env = BackdoorPruneEnv(model, accuracy_budget=None, score_samples=0, clean_samples=IMAGES[network], **options)
    if network == WIDE:
        read(env.generator.get(model))
    env.reset(seed=0)
    return env


def read(victim: Victim) -> None:
    """A pattern in place of what a search, which takes minutes, would find."""
    images = victim.clean.images
    others = images[:100][victim.clean.labels[:100] != 0].contiguous(memory_format=torch.channels_last)
    pattern = 0.1 * torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0))
    triggered = (others + pattern).clamp(0, 1).contiguous(memory_format=torch.channels_last)
    victim.__dict__["reading"] = Reading(
        Correction(),
        images,
        SuspectedTarget(0, 0.5, 0.0, 0.1, {}, {}),
        InvertedTrigger(0, ("addition",), others, triggered, 0.05, -0.5, 0.5),
    )


def ratio(ours: list[float], rivals: list[float]) -> Found:
    """Medians, and the median of the ratios of what ran beside each other."""
    return {
        "seconds": median(ours),
        "rival_seconds": median(rivals),
        "ratio": median(rival / our for our, rival in zip(ours, rivals, strict=True)),
        "ratios": [round(rival / our, 2) for our, rival in zip(ours, rivals, strict=True)],
    }


def measure_steps(network: str) -> Found:
    """Steps of random episodes, their parts, and the floor; rival (a)."""
    env = environment(network)
    victim = env.session.victim
    module, clean = victim.model.network, victim.clean
    random = np.random.default_rng(0)
    steps: tuple[list[float], list[float]] = ([], [])
    evaluations: tuple[list[float], list[float]] = ([], [])
    accuracies: tuple[list[float], list[float]] = ([], [])
    gemm, floors = [], []
    macs, needed = multiply_adds(victim.neurons, clean.images[:1])
    inverted = 0 if victim.inverted is None else len(victim.inverted.images)
    for _ in range(ROUNDS[network]):
        env.reset(seed=0)
        gemm.append(gemm_rate())
        taken = np.zeros(4)
        for unit in random.permutation(len(victim))[: STEPS[network]]:
            after = env.session.state.pruned
            after[unit] = True
            mask = victim.neuron_mask(after)
            other = int(
                random.choice(np.flatnonzero(~after))
            )  # not the unit itself, or the step would find its work done
            taken[2] += seconds(lambda other=other: env.session.peek_clean([other]))
            taken[1] += seconds(lambda other=other: env.session.peek_danger([other]))
            taken[0] += seconds(lambda unit=unit: env.step(int(unit)))
            found: list[float] = []
            taken[3] += seconds(
                lambda mask=mask, found=found: found.append(
                    masked_accuracy(module, victim.neurons, mask, clean.images, clean.labels)
                )
            )
            assert abs(found[0] - env.session.figures.acc) < 1.5 / len(clean), "the two networks answer differently"
            floors.append(needed[unit])
        step, suspected, accurate, rival = taken / STEPS[network]
        for pair, ours in ((steps, step), (evaluations, suspected + accurate), (accuracies, accurate)):
            pair[0].append(ours)
            pair[1].append(rival)
    slopes = median(
        seconds(lambda: env.session.masked.slopes(env.session.state.pruned)) for _ in range(ROUNDS[network])
    )
    observe = median(seconds(env.observe) for _ in range(ROUNDS[network]))
    passes = (0 if victim.inverted is None else inverted + len(victim.inverted.clean)) + min(200, len(clean))
    rate = median(gemm)
    return {
        "neurons": len(victim),
        "images": len(clean),
        "inverted_images": inverted,
        "step": ratio(*steps),
        "accuracy": ratio(*accuracies),
        "accuracy_and_danger": ratio(*evaluations),
        "slopes_s": slopes,
        "observe_s": observe,
        "gemm_gmacs": rate / 1e9,
        "forward_gmacs": macs * len(clean) / 1e9,
        "floor_accuracy_s": float(np.mean(floors)) * len(clean) / rate,
        "floor_step_s": (float(np.mean(floors)) * (len(clean) + inverted) + macs * passes / env.slopes_every) / rate,
    }


def measure_memory(network: str) -> Found:
    """The largest resident size of a process that begins an episode and prunes eight neurons."""
    env = environment(network)
    for unit in np.random.default_rng(0).permutation(len(env.session.victim))[:8]:
        env.step(int(unit))
    return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def measure_preparation(network: str) -> Found:
    """Features and graph of a network that has just come, against passes of training; CLP against rival (b)."""
    victim = Victim(model_of(network), BackdoorPruneEnv(DIGITS).generator.options)
    if network == WIDE:
        read(victim)
    found: Found = {}
    if network != WIDE:
        found["reading_s"] = seconds(lambda: victim.reading)
    module, neurons, clean = victim.model.network, victim.neurons, victim.clean
    known: list[float] = []
    passes: list[float] = []
    bounds: list[float] = []
    loops: list[float] = []
    wanted: set[tuple[str, int]] = set()
    pruned: set[tuple[str, int]] = set()
    for _ in range(ROUNDS[network]):
        known.append(
            seconds(
                lambda: (
                    neuron_features(module, neurons, clean.images, clean.labels, victim.inverted),
                    neuron_graph(module, neurons, connections=4, similar=4),
                )
            )
        )
        passes.append(seconds(lambda: forward_backward(module, clean.images, clean.labels)))
    if network != DIGITS:  # whose convolutions are not all followed by a normalisation of their own
        for _ in range(ROUNDS[network]):
            bounds.append(seconds(lambda: pruned.update(clp(module, victim))))
            loops.append(seconds(lambda: wanted.update(one_svd_a_channel(module, U))))
        assert pruned == wanted, "CLP and its published loop prune different channels"
        found["clp"] = {**ratio(bounds, loops), "pruned": len(pruned)}
    found["features_and_graph"] = {
        "seconds": median(known),
        "passes": median(ours / one for ours, one in zip(known, passes, strict=True)),
    }
    return found


def clp(network: nn.Module, victim: Victim) -> set[tuple[str, int]]:
    """What our CLP prunes: name of the layer, and index."""
    scores = [standardise(bounds) for bounds in uclc(network, victim.neurons)]
    return {
        (layer.name, int(channel))
        for layer, found in zip(victim.neurons.layers, scores, strict=True)
        for channel in torch.nonzero(found > U).flatten()
    }


def measure_repair(network: str) -> Found:
    """A repair with the policy that comes with the package, made ready and all; rival (a) once a prune would be far from it."""
    if network == WIDE:
        return {}  # nothing to repair in random weights
    model = model_of(network)
    result = repair(model)
    return {"seconds": result.seconds, "pruned": len(result.pruned)}


def measure_ppo(network: str) -> Found:
    """A rollout and an update of PPO with the graph policy, and where the time of the rollout goes."""
    torch.set_num_threads(1)  # so that the parts add up
    count, steps = (4, 16) if network != WIDE else (2, 4)
    env = environment(network)
    victim = env.session.victim
    makers = [lambda: _sharing(env, network) for _ in range(count)]
    vector = ThreadedVecEnv(makers)
    onp = ONP(vector, seed=0, **{**PPO, "n_steps": steps, "batch_size": min(64, count * steps)})
    ppo = onp._trainer()
    clock = _Clock()
    for owner, name in (
        (MaskedVictim, "figures"),
        (MaskedVictim, "clean"),
        (MaskedVictim, "restart"),
        (MaskedVictim, "keep"),
        (MaskedVictim, "slopes"),
    ):
        clock.watch(owner, name, "network")
    clock.watch(type(ppo.policy), "forward", "policy")
    clock.watch(type(ppo.policy), "evaluate_actions", "policy")
    taken: dict[str, list[float]] = {"rollout": [], "update": []}
    train = ppo.train
    update: list[float] = []
    ppo.train = lambda: update.append(seconds(train))
    for _ in range(2):
        whole = seconds(lambda: ppo.learn(count * steps, reset_num_timesteps=False))
        taken["update"].append(update[-1])
        taken["rollout"].append(whole - update[-1])
    vector.close()
    steps_done = 2 * count * steps
    total = sum(taken["rollout"]) + sum(taken["update"])
    return {
        "neurons": len(victim),
        "steps": count * steps,
        "rollout_s": min(taken["rollout"]),
        "update_s": min(taken["update"]),
        "network_s_a_step": clock.taken["network"] / steps_done,
        "other_s_a_step": (total - clock.taken["network"]) / steps_done,
        "policy_forward_s_a_step": clock.taken["policy"] / steps_done,
        "ratio": clock.taken["network"] / (total - clock.taken["network"]),
    }


def _sharing(env: BackdoorPruneEnv, network: str) -> gym.Env[Any, Any]:
    twin = BackdoorPruneEnv(
        env.session.victim.model, accuracy_budget=0.05, score_samples=0, clean_samples=IMAGES[network], max_steps=100
    )
    twin.generator = env.generator
    return twin


class _Clock:
    """Seconds spent in methods, by kind; what one of them calls of another is counted once."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}
        self._inside = 0

    def watch(self, owner: type, name: str, kind: str) -> None:
        """Count the time in a method from now on."""
        method = getattr(owner, name)
        self.taken.setdefault(kind, 0.0)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._inside += 1
            found: list[Any] = []
            taken = seconds(lambda: found.append(method(*arguments, **options)))
            self._inside -= 1
            if not self._inside:
                self.taken[kind] += taken
            return found[0]

        setattr(owner, name, timed)


def measure_vector(network: str) -> Found:
    """Steps of the vector environment against rival (c), ``SyncVectorEnv`` of the single ones."""
    if network == WIDE:
        return {}
    count, steps = (16, 4) if network == DIGITS else (4, 3)
    options = {"infected": model_of(network), "score_samples": 0, "accuracy_budget": None}
    vector = BackdoorPruneVectorEnv(count, **options)
    first = vector.envs[0].unwrapped
    sync = gym.vector.SyncVectorEnv([lambda: BackdoorPruneEnv(**options)] * count)
    for one in sync.envs:
        one.unwrapped.generator = first.generator
    ours: list[float] = []
    rivals: list[float] = []
    for index in range(min(5, ROUNDS[network])):
        pair: list[list[Any]] = []
        for env, into in ((vector, ours), (sync, rivals)):
            env.reset(seed=0)
            random = np.random.default_rng(index)
            actions = [random.permutation(len(first.session.victim))[:count] for _ in range(steps)]
            returned: list[Any] = []
            play = partial(_play, env, actions, returned)
            into.append(seconds(play))
            pair.append(returned)
        for one, other in zip(*pair, strict=True):
            assert np.array_equal(one[0]["nodes"], other[0]["nodes"]), "the two returned something else"
    vector.close()
    sync.close()
    return {"num_envs": count, **ratio(ours, rivals)}


def _play(env: Any, actions: list[np.ndarray], returned: list[Any]) -> None:
    returned.extend(env.step(action) for action in actions)


PARTS: dict[str, Callable[[str], Found]] = {
    "steps": measure_steps,
    "memory": measure_memory,
    "preparation": measure_preparation,
    "repair": measure_repair,
    "ppo": measure_ppo,
    "vector": measure_vector,
}


def table(found: dict[str, dict[str, Found]]) -> str:
    """The figures for people, in Markdown."""
    networks = list(found)
    lines = ["| | " + " | ".join(networks) + " |", "|---" * (len(networks) + 1) + "|"]

    def row(title: str, part: str, show: Callable[[Found], str]) -> None:
        cells = []
        for network in networks:
            these = found[network].get(part)
            try:
                cells.append(show(these) if these else "")
            except KeyError:
                cells.append("")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    def against(name: str) -> Callable[[Found], str]:
        return lambda f: f"{f[name]['seconds']:.4f} s, {f[name]['ratio']:.1f} x"

    row("neurons, images", "steps", lambda f: f"{f['neurons']}, {f['images']}")
    row("rival (a), all images", "steps", lambda f: f"{f['step']['rival_seconds']:.4f} s")
    row("step of the environment", "steps", against("step"))
    row("accuracy under one more mask", "steps", against("accuracy"))
    row("the same and suspected danger", "steps", against("accuracy_and_danger"))
    row("derivatives anew", "steps", lambda f: f"{f['slopes_s']:.4f} s")
    row("matrix product (10^9 multiply-adds a second)", "steps", lambda f: f"{f['gemm_gmacs']:.0f}")
    row("floor of the accuracy", "steps", lambda f: f"{f['floor_accuracy_s']:.4f} s")
    row("floor of the step", "steps", lambda f: f"{f['floor_step_s']:.4f} s")
    row("search for the trigger", "preparation", lambda f: f"{f['reading_s']:.1f} s")
    row(
        "features and graph",
        "preparation",
        lambda f: f"{f['features_and_graph']['seconds']:.2f} s, {f['features_and_graph']['passes']:.2f} passes",
    )
    row("CLP against rival (b)", "preparation", against("clp"))
    row("ONP repair", "repair", lambda f: f"{f['seconds']:.1f} s, {f['pruned']} pruned")
    row(
        "PPO: rollout, update", "ppo", lambda f: f"{f['rollout_s']:.2f} s, {f['update_s']:.2f} s for {f['steps']} steps"
    )
    row("network evaluations over all else in training", "ppo", lambda f: f"{f['ratio']:.1f}")
    row("vector step against rival (c)", "vector", lambda f: f"{f['seconds']:.3f} s, {f['ratio']:.2f} x")
    row("peak memory", "memory", lambda f: f"{f['peak_gb']:.2f} GB")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--one", action="store_true", help="in this process: print the figures of one part as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(PARTS[arguments.parts[0]](arguments.networks[0])))
        return
    PART.parent.mkdir(exist_ok=True)
    known = json.loads(PART.read_text(encoding="utf-8")) if PART.is_file() else {}
    done: dict[str, dict[str, Found]] = known.get("networks", {})
    for network in arguments.networks:
        for part in arguments.parts:
            if part in done.setdefault(network, {}):
                continue
            command = [sys.executable, __file__, "--one", "--networks", network, "--parts", part]
            answer = subprocess.run(
                [*command, "--threads", str(arguments.threads)], stdout=subprocess.PIPE, text=True, check=True
            )
            done[network][part] = json.loads(answer.stdout.splitlines()[-1])
            print(network, part, json.dumps(done[network][part]), flush=True)
            machine = {"threads": arguments.threads, "processor": platform.processor() or platform.machine()}
            PART.write_text(
                json.dumps({**machine, "torch": torch.__version__, "networks": done}, indent=1) + "\n", encoding="utf-8"
            )
    print(table(done))
    if set(arguments.networks) == set(IMAGES) and set(arguments.parts) == set(PARTS):
        PART.replace(RESULT)


if __name__ == "__main__":
    main()
