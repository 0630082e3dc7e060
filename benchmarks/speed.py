"""How fast everything is that repairs and trainings consist of, against what a user would write, and against the arithmetic.

    python benchmarks/speed.py                     # adds what is missing in results/speed.jsonl
    python benchmarks/speed.py --out mine.jsonl    # measures all of it, in half an hour or so
    python benchmarks/speed.py --out mine.jsonl --parts vector --networks digits-badnets digits-val/0

On a digits network, and on ResNet-18 of width 16 and 64 with 500 CIFAR-10 images (``BACKDOOR_GYM_DATA`` names their folder).
The widest one has random weights whose BN statistics were set by a pass, and a pattern in place of its inverted trigger:
what it costs does not depend on them. Ours and the rival's work take turns in one run, and ratios are medians over the rounds.
Each part of a network runs in a process of its own and is written when it is done. *clp* is also of ResNet-18 as CLP's authors
write it, and checks that ``clp.prune`` zeroes the channels of the published procedure. *scaling* is for docs/scaling.md.
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
    AUTHORS,
    DIGITS,
    NARROW,
    WIDE,
    Clock,
    as_the_authors_write_it,
    environment,
    forward_backward,
    gemm_rate,
    masked_accuracy,
    model_of,
    multiply_adds,
    one_svd_a_channel,
    ratio,
    read,
    seconds,
    sizes_of,
    with_outliers,
)
from torch import nn

from backdoor_gym import repair
from backdoor_gym.agents import ONP, GraphRolloutBuffer
from backdoor_gym.agents.onp import PPO
from backdoor_gym.agents.vec_env import ThreadedVecEnv
from backdoor_gym.analysis.features import neuron_features, standardise
from backdoor_gym.analysis.neuron_graph import neuron_graph
from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.baselines import clp
from backdoor_gym.benchmarking.resuming import Row, RowFile, run_tasks
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.vector import BackdoorPruneVectorEnv
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.masked_model import MaskedModel
from backdoor_gym.session.prepared_model import PreparedModel

HERE = Path(__file__).parent
U = 3.0


def measure_steps(network: str) -> Row:
    """Steps of random episodes, their parts, and the floor; rival (a)."""
    images, prunes, rounds = sizes_of(network)
    env = environment(network, images)
    prepared = env.session.prepared
    module, clean = prepared.model.network, prepared.clean
    random = np.random.default_rng(0)
    taken = np.zeros((rounds, 4))  # step, suspected danger, accuracy, rival
    gemm, floors = [], []
    macs, needed = multiply_adds(prepared.neurons, clean.images[:1])
    inverted = 0 if prepared.inverted is None else len(prepared.inverted.images)
    for row in taken:
        env.reset(seed=0)
        gemm.append(gemm_rate())
        for unit in random.permutation(len(prepared))[:prunes]:
            after = env.session.state.pruned
            after[unit] = True
            mask = prepared.neuron_mask(after)
            other = int(random.choice(np.flatnonzero(~after)))  # not the unit, or the step would find its work done
            row[2] += seconds(lambda other=other: env.session.peek_clean([other]))
            row[1] += seconds(lambda other=other: env.session.peek_danger([other]))
            row[0] += seconds(lambda unit=unit: env.step(int(unit)))
            acc: list[float] = []
            rival = partial(masked_accuracy, module, prepared.neurons, mask, clean.images, clean.labels)
            row[3] += seconds(lambda acc=acc, rival=rival: acc.append(rival()))
            assert abs(acc[0] - env.session.figures.acc) < 1.5 / len(clean), "the two networks answer differently"
            floors.append(needed[unit])
    step, suspected, accurate, rivals = (column.tolist() for column in taken.T / prunes)
    gradients = median(seconds(lambda: env.session.masked.gradients(env.session.state.pruned)) for _ in range(rounds))
    observe = median(seconds(env.observe) for _ in range(rounds))
    passes = (0 if prepared.inverted is None else inverted + len(prepared.inverted.clean)) + min(200, len(clean))
    rate, floor = median(gemm), float(np.mean(floors))
    return {
        "neurons": len(prepared),
        "images": len(clean),
        "inverted_images": inverted,
        "step": ratio(step, rivals),
        "accuracy": ratio(accurate, rivals),
        "accuracy_and_danger": ratio([sum(pair) for pair in zip(suspected, accurate, strict=True)], rivals),
        "gradients_s": gradients,
        "observe_s": observe,
        "gemm_gmacs": rate / 1e9,
        "forward_gmacs": macs * len(clean) / 1e9,
        "floor_accuracy_s": floor * len(clean) / rate,
        "floor_step_s": (floor * (len(clean) + inverted) + macs * passes / env.gradients_every) / rate,
    }


def measure_memory(network: str) -> Row:
    """The largest resident size of a process that begins an episode and prunes eight neurons."""
    env = environment(network, sizes_of(network)[0])
    for unit in np.random.default_rng(0).permutation(len(env.session.prepared))[:8]:
        env.step(int(unit))
    return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def measure_preparation(network: str) -> Row:
    """Features and graph of a network that has just come, against passes of training."""
    prepared, figures = PreparedModel(model_of(network), BackdoorPruneEnv(DIGITS).generator.options), Row()
    if network == WIDE:
        read(prepared)
    else:
        figures["reading_s"] = seconds(lambda: prepared.evidence)
    module, neurons, clean = prepared.model.network, prepared.neurons, prepared.clean

    def know() -> None:
        neuron_features(module, neurons, clean.images, clean.labels, prepared.inverted)
        neuron_graph(module, neurons, connections=4, similar=4)

    ours, passes = [], []
    for _ in range(sizes_of(network)[2]):
        ours.append(seconds(know))
        passes.append(seconds(lambda: forward_backward(module, clean.images, clean.labels)))
    return figures | {"features_and_graph": {"seconds": median(ours), "passes": ratio(passes, ours)["ratio"]}}


@torch.no_grad()
def measure_clp(network: str) -> Row:
    """UCLC and its outliers, all channels in one batch, against rival (b)."""
    if network not in NETWORKS["clp"]:
        raise SystemExit(f"not all convolutions of {network} are followed by a normalisation of their own")
    module = with_outliers(as_the_authors_write_it(64)).eval() if network == AUTHORS else model_of(network).network
    neurons, ours, rivals = find_neurons(module), [], []
    pruned: list[Any] = []
    for _ in range(sizes_of(network)[2]):
        ours.append(seconds(lambda: pruned.append([standardise(bounds) > U for bounds in uclc(module, neurons)])))
        rivals.append(seconds(lambda: pruned.append(one_svd_a_channel(module, U))))
    batched = {
        (layer.name, channel)
        for layer, outliers in zip(neurons.layers, pruned[-2], strict=True)
        for channel in torch.nonzero(outliers).flatten().tolist()
    }
    published = {(name, channel) for name, channels in pruned[-1] for channel in channels}
    figures = {"channels": len(neurons), **ratio(ours, rivals), "pruned": len(published)}
    if network == AUTHORS:  # whose layers are traced under other names
        norms = [norm for norm in clp.prune(module, u=U).modules() if isinstance(norm, nn.BatchNorm2d)]
        zeroed = [torch.nonzero((norm.weight == 0) & (norm.bias == 0)).flatten().tolist() for norm in norms]
        assert zeroed == [channels for _, channels in pruned[-1]], (
            "clp.prune and the published loop prune other channels"
        )
    else:
        assert batched == published, "CLP and its published loop prune different channels"
    return figures


def measure_repair(network: str) -> Row:
    """A repair with the policy that comes with the package, made ready and all; rival (a) once a prune would be far from it."""
    if network == WIDE:
        return {}  # nothing to repair in random weights
    result = repair(model_of(network))
    return {"seconds": result.seconds, "pruned": len(result.pruned)}


def measure_ppo(network: str) -> Row:
    """A rollout and an update of PPO with the graph policy, and where the time of the rollout goes."""
    torch.set_num_threads(1)  # so that the parts add up
    count, steps = (4, 16) if network != WIDE else (2, 4)
    images = sizes_of(network)[0]
    env = environment(network, images)

    def twin() -> gym.Env[Any, Any]:
        options = {"accuracy_budget": 0.05, "score_samples": 0, "clean_samples": images, "max_steps": 100}
        sharing = BackdoorPruneEnv(env.session.prepared.model, **options)
        sharing.generator = env.generator
        return sharing

    vector = ThreadedVecEnv([twin] * count)
    onp = ONP(vector, seed=0, **{**PPO, "n_steps": steps, "batch_size": min(64, count * steps)})
    ppo = onp.trainer()
    clock = Clock()
    for name in ("figures", "clean", "restart", "keep", "gradients"):
        clock.watch(MaskedModel, name, "network")
    for name in ("forward", "evaluate_actions"):
        clock.watch(type(ppo.policy), name, "policy")
    train, updates, rollouts = ppo.train, list[float](), list[float]()
    ppo.train = lambda: updates.append(seconds(train))
    for _ in range(2):
        whole = seconds(lambda: ppo.learn(count * steps, reset_num_timesteps=False))
        rollouts.append(whole - updates[-1])
    vector.close()
    done, networks = 2 * count * steps, clock.taken["network"]
    rest = sum(rollouts) + sum(updates) - networks
    return {
        "neurons": len(env.session.prepared),
        "steps": count * steps,
        "rollout_s": min(rollouts),
        "update_s": min(updates),
        "network_s_a_step": networks / done,
        "other_s_a_step": rest / done,
        "policy_forward_s_a_step": clock.taken["policy"] / done,
        "ratio": networks / rest,
    }


def measure_vector(network: str) -> Row:
    """Steps of the vector environment against rival (c), ``SyncVectorEnv`` of the single ones."""
    if network == WIDE:
        return {}
    count, steps = (4, 3) if network == NARROW else (16, 4)
    options = {"infected": model_of(network), "score_samples": 0, "accuracy_budget": None}
    vector = BackdoorPruneVectorEnv(count, **options)
    first = vector.envs[0].unwrapped
    sync = gym.vector.SyncVectorEnv([lambda: BackdoorPruneEnv(**options)] * count)
    for env in sync.envs:
        env.unwrapped.generator = first.generator
    taken: tuple[list[float], list[float]] = ([], [])
    for index in range(5):
        returned: list[list[Any]] = []
        for env, into in zip((vector, sync), taken, strict=True):
            env.reset(seed=0)
            random = np.random.default_rng(index)
            actions = [random.permutation(len(first.session.prepared))[:count] for _ in range(steps)]
            answers: list[Any] = []
            into.append(seconds(partial(answers.extend, map(env.step, actions))))
            returned.append([answer[0]["nodes"] for answer in answers])
        assert all(map(np.array_equal, *returned)), "the two returned something else"
    vector.close()
    sync.close()
    return {"num_envs": count, **ratio(*taken)}


def measure_scaling(network: str) -> Row:
    """What prunes and training cost in passes of all clean images and in bytes; 48 images of the widest, the search for real."""
    env = BackdoorPruneEnv(
        model_of(network), accuracy_budget=None, score_samples=0, clean_samples=48 if network == WIDE else 200
    )
    preparing = seconds(lambda: env.reset(seed=0))
    prepared = env.session.prepared
    macs, _ = multiply_adds(prepared.neurons, prepared.clean.images[:1])
    images = prepared.clean.images.contiguous(memory_format=torch.channels_last)
    units = (
        np.random.default_rng(0).permutation(len(prepared))[:8].tolist()
    )  # two are followed by derivatives taken anew
    with torch.no_grad():
        forward = median(seconds(lambda: prepared.model.network(images)) for _ in range(3))
    evaluations = [seconds(lambda unit=unit: env.session.peek([unit])) for unit in units]
    env.reset(seed=0)
    steps = [seconds(lambda unit=unit: env.step(unit)) for unit in units]
    buffer = GraphRolloutBuffer(64, env.observation_space, env.action_space, "cpu", n_envs=1)
    stored = [
        *buffer.observations.values(),
        *(value for value in vars(buffer).values() if isinstance(value, np.ndarray)),
    ]
    observation = env.observe()
    return {
        "neurons": len(prepared),
        "images": len(images),
        "mmacs_an_image": macs / 1e6,
        "prepare_s": preparing,
        "forward_s": forward,
        "evaluation_s": float(np.mean(evaluations)),
        "gradients_s": median(seconds(lambda: prepared.gradients(env.session.state.pruned)) for _ in range(3)),
        "step_s": float(np.mean(steps)),
        "observation_bytes": sum(array.nbytes for array in observation.values()),
        "rollout_bytes_a_step": round(sum(array.nbytes for array in stored) / 64),
        "graph_bytes": observation["edges"].nbytes + observation["edge_links"].nbytes + len(prepared) * 40,
    }


PARTS: dict[str, Callable[[str], Row]] = {
    "steps": measure_steps,
    "memory": measure_memory,
    "preparation": measure_preparation,
    "clp": measure_clp,
    "repair": measure_repair,
    "ppo": measure_ppo,
    "vector": measure_vector,
    "scaling": measure_scaling,
}


#: What a part is measured on, where it is not the three networks.
NETWORKS = {"clp": (NARROW, WIDE, AUTHORS), "scaling": ("digits-badnets", NARROW, WIDE)}


def against(name: str | None = None) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        figures = row if name is None else row[name]
        return f"{figures['seconds']:.4f} s, {figures['ratio']:.2f} x"

    return show


#: Of each line of the table: the title, the part, and what is shown of it.
LINES: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("neurons, images", "steps", lambda row: f"{row['neurons']}, {row['images']}"),
    ("rival (a), all images", "steps", lambda row: f"{row['step']['rival_seconds']:.4f} s"),
    ("step of the environment", "steps", against("step")),
    ("accuracy under one more mask", "steps", against("accuracy")),
    ("the same and suspected danger", "steps", against("accuracy_and_danger")),
    ("derivatives anew", "steps", lambda row: f"{row['gradients_s']:.4f} s"),
    ("matrix product (10^9 multiply-adds a second)", "steps", lambda row: f"{row['gemm_gmacs']:.0f}"),
    (
        "floor of accuracy, and of a step",
        "steps",
        lambda row: f"{row['floor_accuracy_s']:.4f}, {row['floor_step_s']:.4f} s",
    ),
    ("search for the trigger", "preparation", lambda row: f"{row['reading_s']:.1f} s"),
    ("features and graph, in passes", "preparation", lambda row: f"{row['features_and_graph']['passes']:.2f}"),
    ("CLP against rival (b)", "clp", against()),
    ("ONP repair", "repair", lambda row: f"{row['seconds']:.1f} s, {row['pruned']} pruned"),
    (
        "PPO: rollout, update",
        "ppo",
        lambda row: f"{row['rollout_s']:.2f}, {row['update_s']:.2f} s for {row['steps']} steps",
    ),
    ("network evaluations over all else in training", "ppo", lambda row: f"{row['ratio']:.1f}"),
    ("vector step against rival (c)", "vector", lambda row: f"{row['ratio']:.2f} x"),
    ("peak memory", "memory", lambda row: f"{row['peak_gb']:.2f} GB"),
    ("forward, step", "scaling", lambda row: f"{row['forward_s']:.3f}, {row['step_s']:.3f} s"),
)


def table(rows: list[Row]) -> str:
    """The figures for people, in Markdown."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = ["| | " + " | ".join(networks) + " |", "|---" * (len(networks) + 1) + "|"]
    for title, part, show in LINES:
        cells = dict.fromkeys(networks, "")
        for row in rows:
            if row["part"] == part and len(row) > len(MACHINE):
                try:
                    cells[row["network"]] = show(row)
                except KeyError:  # one figure that this network does not have
                    continue
        if any(cells.values()):
            lines.append(f"| {title} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


#: What every row says.
MACHINE = ("network", "part", "threads", "processor", "torch")


def measure(network: str, part: str, threads: int, file: RowFile) -> None:
    """One part, in a process of its own."""
    command = [sys.executable, __file__, "--alone", network, part, "--threads", str(threads)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(answer.stdout.splitlines()[-1])
    machine = (network, part, threads, platform.processor() or platform.machine(), torch.__version__)
    file.add(**dict(zip(MACHINE, machine, strict=True)), **figures)
    print(network, part, json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="+", help="names; default: those that the record is of")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed.jsonl")
    parser.add_argument("--alone", nargs=2, metavar=("NETWORK", "PART"), help="in this process: print one part as JSON")
    arguments = parser.parse_args()
    if arguments.alone:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(PARTS[arguments.alone[1]](arguments.alone[0])))
        return
    file = RowFile(arguments.out, MACHINE[:3])
    tasks = [
        (network, part, arguments.threads)
        for part in arguments.parts
        for network in arguments.networks or NETWORKS.get(part, (DIGITS, NARROW, WIDE))
    ]
    run_tasks(measure, file.missing(tasks), file)
    print(table([row for row in file.rows() if (row["network"], row["part"], row["threads"]) in tasks]))


if __name__ == "__main__":
    main()
