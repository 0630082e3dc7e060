"""CLP's own two claims, on networks of every architecture: UCLC goes with what the trigger does, and u hardly matters.

    python benchmarks/clp_claims.py
    python benchmarks/clp_claims.py --models benchmarks/models/resnet18-badnets.safetensors --out claims

The first (section 3.3 of the paper): in each layer the UCLC of the channels correlates with their trigger-activated change,
the mean over images of ||F_k(x) - F_k(trigger(x))||_2. The second (section 5.4): ACC and ASR after pruning by thresholds u
from 1 to 6. Writes ``clp_claims.json``, ``clp_change.png`` and ``clp_thresholds.png`` into ``results`` or the folder of ``--out``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, fx

import backdoor_gym
from backdoor_gym.analysis.features import standardise
from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.masking.export import write_mask
from backdoor_gym.models.infected import InfectedModel
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.neurons.layers import Neurons

HERE = Path(__file__).parent
THRESHOLDS = [1 + step / 2 for step in range(11)]
#: Test images that the change is measured on, and those that ACC and ASR are.
CHANGE_IMAGES, SCORE_IMAGES = 300, 3_000


class Outputs(fx.Interpreter):
    """Runs the graph and keeps what each layer of neurons gives."""

    def __init__(self, neurons: Neurons) -> None:
        super().__init__(neurons.graph)
        self.nodes = {layer.node for layer in neurons.layers}
        self.outputs: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            self.outputs[n.name] = value.flatten(2) if value.ndim > 2 else value.unsqueeze(2)
        return value


@torch.no_grad()
def trigger_activated_change(model: InfectedModel, neurons: Neurons) -> list[np.ndarray]:
    """Of each layer's channels, float (channels,)."""
    assert model.test is not None
    assert model.trigger is not None
    images = model.test.first(CHANGE_IMAGES).images
    total: dict[str, Tensor] = {}
    for batch in images.split(100):
        clean, triggered = Outputs(neurons), Outputs(neurons)
        clean.run(batch)
        triggered.run(model.trigger(batch))
        for layer in neurons.layers:
            change = (clean.outputs[layer.node] - triggered.outputs[layer.node]).norm(dim=2).sum(0)
            total[layer.node] = total.get(layer.node, torch.zeros(())) + change
    return [(total[layer.node] / len(images)).numpy() for layer in neurons.layers]


def examine(file: str) -> dict[str, Any]:
    """One network: the correlation in each layer, and the figures at each threshold."""
    model = backdoor_gym.load_infected(file)
    neurons = find_neurons(model.network)
    bounds = uclc(model.network, neurons)
    changes = trigger_activated_change(model, neurons)
    correlations = [
        float(np.corrcoef(bound.numpy(), change)[0, 1]) for bound, change in zip(bounds, changes, strict=True)
    ]
    assert model.test is not None
    short = InfectedModel(
        model.network, model.clean, model.test.first(SCORE_IMAGES), model.trigger, model.target, name=model.name
    )
    scores = np.concatenate([standardise(bound).numpy() for bound in bounds])
    rows = []
    for u in THRESHOLDS:
        after = short.evaluate(write_mask(model.network, neurons, ~(scores > u)))
        rows.append({"u": u, "pruned": int((scores > u).sum()), "acc": after.acc, "asr": after.asr})
    before = short.evaluate()
    return {
        "model": Path(file).stem,
        "layers": [layer.name for layer in neurons.layers],
        "correlations": correlations,
        "acc": before.acc,
        "asr": before.asr,
        "thresholds": rows,
    }


def draw(networks: list[dict[str, Any]], folder: Path) -> None:
    """Both claims, a panel for each network."""
    columns = min(4, len(networks))
    shape = (-(-len(networks) // columns), columns)
    size = (3.4 * columns, 2.8 * shape[0])
    changes, panels = plt.subplots(*shape, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, network in zip(panels.flat, networks, strict=False):
        axes.bar(range(len(network["correlations"])), network["correlations"])
        axes.set_title(f"{network['model']} (mean {np.mean(network['correlations']):.2f})", fontsize=9)
        axes.set_ylim(-1, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.3)
    changes.supxlabel("layer, from the images to the logits: UCLC against the change by the trigger")
    changes.supylabel("correlation")
    thresholds, others = plt.subplots(*shape, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, network in zip(others.flat, networks, strict=False):
        us = [row["u"] for row in network["thresholds"]]
        axes.plot(us, [100 * row["acc"] for row in network["thresholds"]], "o-", markersize=3, label="ACC")
        axes.plot(us, [100 * row["asr"] for row in network["thresholds"]], "s-", markersize=3, label="ASR")
        axes.axhline(100 * network["acc"], color="C0", linewidth=0.8, linestyle=":")
        axes.axvline(3, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(network["model"], fontsize=9)
        axes.grid(alpha=0.3)
    others.flat[0].legend()
    thresholds.supxlabel("u, in standard deviations of the layer")
    thresholds.supylabel("after pruning (%)")
    for picture, name, all_axes in ((changes, "clp_change.png", panels), (thresholds, "clp_thresholds.png", others)):
        for axes in list(all_axes.flat)[len(networks) :]:
            axes.axis("off")
        picture.savefig(folder / name, dpi=120)
        plt.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    infected = [str(file) for file in sorted((HERE / "models").glob("*.safetensors")) if "clean" not in file.name]
    parser.add_argument("--models", nargs="*", default=infected)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    networks = []
    for file in arguments.models:
        networks.append(examine(file))
        print(networks[-1]["model"], f"mean correlation {np.mean(networks[-1]['correlations']):.2f}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "clp_claims.json").write_text(json.dumps(networks, indent=1) + "\n", encoding="utf-8")
    draw(networks, arguments.out)


if __name__ == "__main__":
    main()
