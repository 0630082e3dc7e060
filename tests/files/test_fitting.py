import time
from pathlib import Path

import pytest
import torch
from torch import nn

from backdoor_gym.errors import WeightsError
from backdoor_gym.files.checkpoints import Checkpoint, read_checkpoint
from backdoor_gym.files.fitting import beginnings, fit_weights

from .conftest import Net, prefixed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("deep.1.bias"), r"1 missing \(deep\.1\.bias\)"),
        (lambda weights: weights.update(more=torch.zeros(1)), r"1 unexpected \((module\.)?more\)"),
        (lambda weights: weights.update({"deep.1.bias": torch.zeros(7)}), r"deep\.1\.bias \(7,\) instead of \(2,\)"),
        (lambda weights: weights.pop("norm.running_var"), r"missing \(norm\.running_var\)"),
        (
            lambda weights: weights.update({"deep.1.bias": torch.zeros(2, dtype=torch.int8)}),
            r"1 quantised or of integers .*deep\.1\.bias int8",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_another_network_are_refused_by_name(change, words, prefix, trained, tmp_path):
    weights = dict(trained.state_dict())
    change(weights)
    torch.save(prefixed(prefix, weights), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=words) as caught:
        fit_weights(Net(), read_checkpoint(tmp_path / "a.pt"))
    assert ('"module." was taken off' in str(caught.value)) == bool(prefix)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"head.weight": torch.zeros(2, 2)}, r"1 unexpected \(head\.weight\)"),  # may come after the network
        ({"normalize.mean": torch.zeros(3)}, r"1 unexpected \(normalize\.mean\)"),  # it takes other images, then
        ({"model.aux.weight": torch.zeros(2)}, r"1 unexpected \(model\.aux\.weight\)"),
    ],
)
def test_what_may_belong_to_the_network_is_not_left_out(more, words, trained, tmp_path):
    torch.save({**prefixed("model.", trained.state_dict()), **more}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=words):
        fit_weights(Net(), read_checkpoint(tmp_path / "a.pt"))


def test_what_is_left_out_is_named(trained, tmp_path):
    weights = trained.state_dict()
    beside = {"model.loss.weight": torch.ones(2), "n_averaged": torch.tensor(3), **prefixed("ema.", weights)}
    torch.save({**prefixed("model.net.", weights), **beside}, tmp_path / "a.pt")
    left_out = fit_weights(Net(), read_checkpoint(tmp_path / "a.pt"))
    assert left_out == list(beside)
    assert beginnings(left_out) == ["model.loss", "n_averaged", "ema"]


def test_networks_that_nothing_tells_apart_are_refused(trained, tmp_path):
    torch.save({**prefixed("left.", trained.state_dict()), **prefixed("right.", trained.state_dict())}, tmp_path / "a")
    with pytest.raises(WeightsError, match=r"several networks that fit \(left\., right\.\)"):
        fit_weights(Net(), read_checkpoint(tmp_path / "a"))


@pytest.mark.slow
def test_many_names_are_matched_in_time():
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300)))
    weights = {f"model.{key}": value for key, value in network.state_dict().items()}
    weights |= {f"ema{number}.a.b.c.d": torch.ones(1) for number in range(40_000)}
    start = time.monotonic()
    beside = fit_weights(network, Checkpoint(Path("a.pt"), weights, {}))
    assert time.monotonic() - start < 5
    assert len(beside) == 40_000


def test_many_copies_of_a_small_network_are_left_out_in_time():
    network, ones = nn.Linear(1, 1), torch.ones(1)
    weights = {f"{held}.{key}": ones for held in ("model", *map(str, range(20_000))) for key in ("weight", "bias")}
    weights = {key: value.view(1, 1) if key.endswith("weight") else value for key, value in weights.items()}
    start = time.monotonic()
    assert len(fit_weights(network, Checkpoint(Path("a.pt"), weights, {}))) == 40_000
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex numbers where floats are needed"),
        (torch.ones(2, dtype=torch.bool), "where floats are needed"),
        (torch.ones(2, dtype=torch.uint16), "where floats are needed"),
    ],
)
def test_weights_are_floats(tensor, words):
    network = nn.BatchNorm1d(2)
    with pytest.raises(WeightsError, match=words):
        fit_weights(network, Checkpoint(Path("a.pt"), {**network.state_dict(), "weight": tensor}, {}))
    for counter in (torch.tensor(1.5), torch.tensor(torch.nan), torch.tensor(1j)):
        with pytest.raises(WeightsError, match="no whole numbers"):
            fit_weights(network, Checkpoint(Path("a.pt"), {**network.state_dict(), "num_batches_tracked": counter}, {}))
    fit_weights(
        network, Checkpoint(Path("a.pt"), {**network.state_dict(), "num_batches_tracked": torch.tensor(7.0)}, {})
    )
    assert network.num_batches_tracked == 7
