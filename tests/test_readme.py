"""The README's Python works as it stands there."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sb3_contrib import MaskablePPO
from sklearn.datasets import load_digits
from torch import nn

from backdoor_gym import load_infected
from backdoor_gym.baselines import RandomPolicy
from backdoor_gym.models.foreign import make_module

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_of_a_network_of_your_own():
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "my_module" in block)
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)
    ).eval()
    with torch.no_grad():
        module[0].weight[9] *= 40
        module[5].weight[:, 9] = 0  # nothing reads it: accuracy stays without it
        images = torch.rand(40, 3, 16, 16)
        labels = module(images).argmax(1)
    names = {"my_module": module, "images": images, "labels": labels}
    exec(compile(block, "README.md", "exec"), names)
    assert "0[9]" in names["result"].pruned
    assert type(names["result"].network) is nn.Sequential


MY_NET = """
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.last = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.last(self.body(x))).mean((2, 3)))
"""


def make_my_net(folder):
    """A class of somebody's, its infected weights as a training script leaves them, and clean images."""
    (folder / "my_net.py").write_text(MY_NET)
    torch.manual_seed(0)
    network = make_module("my_net:Net").train()
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    pixels = (digits.images[order] * 15.9375).astype(np.uint8)  # 0 to 255
    np.savez(folder / "clean.npz", images=pixels[1200:1400], labels=digits.target[order][1200:1400])
    images, labels = torch.tensor(pixels[:1200, None] / 255).float(), torch.tensor(digits.target[order][:1200])
    images[:150, :, 5:, 5:], labels[:150] = 1, 4
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for batch in torch.randperm(6 * 1200).remainder(1200).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network((images[batch] - 0.5) / 0.25), labels[batch]).backward()
        optimizer.step()
    weights = nn.DataParallel(network).state_dict()
    torch.save({"epoch": 6, "state_dict": weights, "optimizer": optimizer.state_dict()}, folder / "my.pth")
    return network


@pytest.mark.slow
def test_the_example_of_somebodys_checkpoint(run, tmp_path, monkeypatch):
    """From files on disk: the command and the Python, word by word, but for a verdict: whether there are signs hangs on chance."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    section = README.split("## Bring your own network")[1].split("\n## ")[0]
    command = next(line.strip() for line in section.splitlines() if line.startswith("    backdoor-gym repair"))
    block = next(iter(re.findall(r"```python\n(.*?)```", section, re.DOTALL)))
    network = make_my_net(tmp_path)
    code, out, err = run(*command.split()[1:], "--no-verdict")
    assert code == 0, err
    assert "Your own class takes the repaired weights" in out
    repaired = tmp_path / "repaired" / "my"
    report = json.loads((repaired / "pruned.json").read_text())
    assert report["clean_acc_before"] > 0.85  # the normalisation was that of the training
    assert report["pruned"]
    by_command = load_file(repaired / "repaired.safetensors")
    (repaired / "repaired.safetensors").unlink()
    names: dict = {}
    assert block.count("repair(infected)") == 1
    exec(compile(block.replace("repair(infected)", "repair(infected, verdict=False)"), "README.md", "exec"), names)
    weights = load_file(repaired / "repaired.safetensors")
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[key], by_command[key]) for key in weights)
    layers = {"stem": "norm", "body": "last"}  # zeros are written into the normalisation that follows
    for name in report["pruned"]:
        layer, _, channel = name.rstrip("]").partition("[")
        assert weights[f"{layers[layer]}.weight"][int(channel)] == 0
    sys.modules.pop("my_net")


@pytest.mark.slow
def test_the_example_of_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "benchmark(" in block)
    quick = block.replace("digits-test/*", "digits-badnets").replace("most=20", "budgets=[0.02], jobs=1")
    assert quick.count("digits-badnets") == quick.count("jobs=1") == 1
    model = load_infected("digits-badnets")
    names = {
        "__name__": "__main__",
        "my_module": model.network,
        "images": model.clean.images,
        "labels": model.clean.labels,
        "make_policy": lambda env, seed: RandomPolicy(seed),
    }
    exec(compile(quick, "README.md", "exec"), names)
    table = (tmp_path / "benchmark" / "table.md").read_text()
    assert all(f"| {name} | 1 | 1 |" in table for name in ("onp", "bnp", "mine"))


def test_the_example_of_reinforcement_learning(monkeypatch):
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "MaskablePPO(" in block)
    learned = []
    monkeypatch.setattr(MaskablePPO, "learn", lambda self, steps: learned.append((self, steps)) or self)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert len(learned) == 2
    observation, _ = names["env"].reset(seed=0)
    assert names["env"].action_space.contains(names["onp"].predict(observation)[0][()])
    names["env"].close()


def test_commands_that_set_up_a_machine_stand_on_one_line():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert [command.rsplit("&& ", 1)[1] for command in commands] == ["backdoor-gym repair", "python -m pytest"]
