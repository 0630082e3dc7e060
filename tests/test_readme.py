"""The README's Python works as it stands there."""

import re
from pathlib import Path

import torch
from torch import nn

from backdoor_gym import load_infected
from backdoor_gym.baselines import RandomPolicy

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


def test_commands_that_set_up_a_machine_stand_on_one_line():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert [command.rsplit("&& ", 1)[1] for command in commands] == ["backdoor-gym repair", "python -m pytest"]
