"""Benchmarks and model making over a real Ray cluster of two machines, one of which dies."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray
from ray.cluster_utils import Cluster

import backdoor_gym
from backdoor_gym.benchmarking.cells import CellFile
from backdoor_gym.errors import DataError
from backdoor_gym.models import building, digits_family, family
from backdoor_gym.on_ray.cluster import cluster

MODULE = '''
import os, time
from pathlib import Path
from backdoor_gym.baselines import RandomPolicy

def slow(env, seed):
    """Notes that it was run, on which machine, and takes its time."""
    import ray
    with Path(os.environ["RUNS"]).open("a") as runs:
        runs.write(ray.get_runtime_context().get_node_id() + "\\n")
    time.sleep(1.5)
    return RandomPolicy(seed)
'''


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """A head that does nothing, and two machines of one core."""
    (tmp_path / "users_policy.py").write_text(MODULE)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.workers = [made.add_node(num_cpus=1) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()
    sys.modules.pop("users_policy", None)


@pytest.fixture
def models(infected, tmp_path):
    return [str(infected.save(tmp_path / f"model-{index}.safetensors")) for index in range(4)]


def test_a_machine_that_dies_loses_no_finished_cell_and_the_rest_completes(machines, models, tmp_path):
    out = tmp_path / "out"
    before_the_fall = []

    def lines(file):
        return file.read_text().splitlines() if file.is_file() else []

    def kill_one():
        while len(lines(out / "cells.jsonl")) < 3 or len(set(lines(tmp_path / "runs"))) < 2:  # both are at work
            time.sleep(0.05)
        machines.remove_node(machines.workers[1], allow_graceful=False)
        before_the_fall.extend((out / "cells.jsonl").read_text().splitlines())

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    done = backdoor_gym.benchmark(
        models, ["users_policy:slow"], [0.02], seeds=4, out=out, max_steps=3, ray=machines.address
    )
    killer.join()
    assert not done.failed
    assert len(done.results) == 4 * 4
    found = lines(out / "cells.jsonl")
    assert found[: len(before_the_fall)] == before_the_fall
    assert 3 <= len(before_the_fall) < len(found) == 16, "a finished cell was run again"
    assert len(set(found)) == 16


def test_models_made_on_the_cluster_come_to_the_cache_here(machines, tmp_path, monkeypatch):
    monkeypatch.setenv(family.CACHE_VARIABLE, str(tmp_path / "cache"))
    quick = min(range(40), key=lambda seed: digits_family.recipe("digits-train", seed).width)
    name = f"digits-train/{quick}"
    assert list(building.build([name], 1, machines.address)) == [(name, "")]
    assert family.cache_path(name).is_file()
    assert list(building.build([name], 1, machines.address)) == [(name, "")]
    assert backdoor_gym.load_infected(name).facts["acc"] > 0.9


def test_tasks_compute_with_one_core_and_call_what_is_kept_here(machines, tmp_path):
    file = CellFile(Path(tmp_path / "cells.jsonl"))
    with cluster(machines.address) as pool:
        kept = pool.keeper(file)
        assert list(pool.map(pow, [2, 3], [5, 2])) == [32, 9]
        assert pool.submit(_ask, kept).result() == (1, [])
        assert type(pool.submit(divmod, 1, 0).exception()) is ZeroDivisionError


def _ask(kept):
    import torch

    return torch.get_num_threads(), kept.read_all()


def test_no_cluster_at_an_address_is_said(tmp_path):
    with pytest.raises(DataError, match="no Ray cluster at"), cluster("127.0.0.1:1"):
        pass
