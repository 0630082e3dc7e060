import json
import warnings
from html import unescape

import gymnasium as gym
import pytest
import torch
from sb3_contrib import MaskablePPO
from torch import nn

from backdoor_gym import InfectedModel, load_infected, repair
from backdoor_gym.agents import ONP
from backdoor_gym.analysis.evidence import VERDICT_THRESHOLD
from backdoor_gym.baselines import CLP, RandomPolicy
from backdoor_gym.errors import BackdoorGymError, ModelFileError, UnknownNameError
from backdoor_gym.files.tensors import read_tensors


def test_what_repair_says_is_what_it_did(infected):
    result = repair(infected, "clp", u=1.5)
    assert result.before == infected.evaluate()
    assert result.after == infected.evaluate(result.network)
    assert result.pruned
    zeros = {
        f"{layer.name}[{channel}]"
        for layer in result.neurons.layers
        for channel in torch.nonzero(result.network.get_submodule(layer.module).weight == 0).flatten().tolist()
    }
    assert set(result.pruned) == zeros
    assert type(result.network) is type(infected.network)
    assert (result.before.asr - result.after.asr + 1) / 2 >= result.der - 1e-9


def test_a_result_tells_how_much_of_the_network_it_could_prune(tmp_path):
    class Partly(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 6, 3)
            self.hidden = torch.nn.Parameter(torch.rand(6, 2))
            self.head = torch.nn.Linear(2, 10)

        def forward(self, images):
            return self.head(self.conv(images).mean((2, 3)) @ self.hidden)

    clean = (torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
    result = repair(InfectedModel.from_module(Partly(), clean=clean), "clp")
    assert result.coverage == 6 / 8
    result.save(tmp_path)
    assert json.loads((tmp_path / "pruned.json").read_text())["coverage"] == 0.75


def test_the_default_of_clp_is_the_published_rule(infected):
    result = repair(infected, "clp")
    from backdoor_gym.baselines import clp

    expected = clp.prune(infected.network, u=3.0)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in result.network.state_dict().items())


@pytest.mark.slow
def test_the_policy_sees_neither_trigger_nor_test_images(infected):
    blind = InfectedModel(infected.network, infected.clean)
    assert repair(blind, "clp", u="auto").pruned == repair(infected, "clp", u="auto").pruned
    pruned = repair(infected, accuracy_budget=0.05).pruned
    assert pruned
    assert repair(blind, accuracy_budget=0.05).pruned == pruned
    assert repair(blind).before.acc is None
    assert repair(blind).der is None


def test_a_budget_is_kept(infected):
    result = repair(infected, "random", accuracy_budget=0.02, seed=1)
    assert result.clean_acc_before - result.clean_acc_after <= 0.02 + 1e-9
    assert result.pruned


@pytest.mark.slow
def test_any_policy_with_predict_is_taken(infected):
    result = repair(infected, RandomPolicy(3), accuracy_budget=0.05)
    assert result.policy == "randompolicy"
    assert result.pruned == repair(infected, "random", accuracy_budget=0.05, seed=3).pruned
    assert repair(infected, CLP(None, 1.5), accuracy_budget=None).pruned == repair(infected, "clp", u=1.5).pruned


def test_a_policy_that_needs_masks_gets_them(infected):
    env = gym.make("BackdoorPrune-v0", infected=infected, score_samples=0)
    model = MaskablePPO("MultiInputPolicy", env, n_steps=16, batch_size=16, seed=0)
    model.policy.action_net.bias.data[-1] = -1000  # stopping
    result = repair(infected, model, accuracy_budget=None, max_steps=20)
    assert len(result.pruned) == len(set(result.pruned)) == 20  # an illegal action would have pruned nothing
    assert result.policy == "maskableppo"


def test_the_chosen_threshold_is_told(infected):
    result = repair(infected, "clp", u="auto")
    assert repair(infected, "clp", u=result.settings["u"]).pruned == result.pruned
    assert result.report()["settings"] == result.settings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clp", "bnp", "ep", "rnp", "fine-pruning", "magnitude", "greedy"])
def test_every_rule_repairs_by_name_as_far_as_a_budget_goes(infected, name, tmp_path):
    options = {} if name == "greedy" else {"u" if name == "clp" else "threshold": "budget"}
    result = repair(infected, name, 0.03, max_steps=6, **options)
    assert result.pruned
    assert result.clean_acc_before - result.clean_acc_after <= 0.03 + 1e-9
    assert result.settings == options
    result.save(tmp_path)
    assert json.loads((tmp_path / "pruned.json").read_text())["settings"] == options


def test_groups_can_be_pruned(infected):
    result = repair(infected, "clp", u=1.5, residual="group")
    assert len(result.pruned) > len(repair(infected, "clp", u=1.5).pruned)


def test_pruned_neurons_can_give_their_clean_mean(infected, tmp_path):
    zero, mean = (repair(infected, "clp", u=1.5, fill=fill) for fill in ("zero", "mean"))
    assert repair(infected, "clp", u=1.5).clean_acc_after == zero.clean_acc_after
    assert zero.fill is None
    assert (mean.arguments["fill"], mean.pruned) == ("mean", zero.pruned)
    assert mean.fill.any()
    images, labels = infected.clean.images, infected.clean.labels
    with torch.no_grad():
        logits = mean.network(images)
        assert not torch.allclose(logits, zero.network(images), rtol=1e-2, atol=1e-2)
        assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(mean.clean_acc_after)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what pads with zeros keeps its constants
            compact = mean.compact()
        torch.testing.assert_close(compact(images), logits, rtol=1e-4, atol=1e-4)
        weights, *_, page = mean.save(tmp_path)
        torch.testing.assert_close(load_infected(weights).network(images), logits)
    text = unescape(page.read_text())
    assert "fill='mean'" in text
    assert "with their clean means where neurons were pruned" in text


def test_a_network_of_ones_own_with_constants_is_cut(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 20, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(720, 3))
    with torch.no_grad():
        module[0].weight[4] *= 50
        module[0].bias += 1
    images = torch.rand(30, 1, 8, 8)
    model = InfectedModel.from_module(module, clean=(images, torch.randint(0, 3, (30,))))
    result = repair(model, "clp", fill="mean")
    assert result.pruned == ["0[4]"]
    assert result.compact()[0].out_channels == 19
    own = result.module
    assert not own[0].weight[4].any()
    torch.testing.assert_close(own[0].bias[4], module[:2](images)[:, 4].mean())
    torch.testing.assert_close(result.compact()(images), own(images), rtol=1e-4, atol=1e-4)
    result.save(tmp_path)
    assert json.loads((tmp_path / "pruned.json").read_text())["arguments"]["fill"] == "mean"


def test_a_module_that_is_not_ours(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 20, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(720, 3))
    with torch.no_grad():
        module[0].weight[4] *= 50
    model = InfectedModel.from_module(module, clean=(torch.rand(30, 1, 8, 8), torch.randint(0, 3, (30,))))
    result = repair(model, "clp")
    assert result.pruned == ["0[4]"]
    assert result.compact()[0].out_channels == 19
    weights, report, picture, page = result.save(tmp_path / "deep" / "out")
    tensors, _ = read_tensors(weights)
    module.load_state_dict(tensors)
    assert not module[0].weight[4].any()
    assert json.loads(report.read_text())["pruned"] == ["0[4]"]
    assert picture.stat().st_size > 10_000
    assert page.name == "report.html"
    assert page.read_text().endswith("</html>")


@pytest.mark.slow
def test_the_saved_network_is_an_infected_model_again(infected, tmp_path):
    result = repair(infected, "clp", u=1.5)
    weights, *_ = result.save(tmp_path)
    again = InfectedModel.load(weights)
    assert again.evaluate() == result.after
    assert again.name == "tiny-repaired"
    assert again.facts["repaired_by"] == "clp"
    assert repair(again, "clp", u=1.5).before == result.after


def test_compact_gives_the_same_answers(infected):
    result = repair(infected, "clp", u=1.0)
    smaller = result.compact()
    images = infected.test.images[:50]
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), result.network(images), rtol=1e-4, atol=1e-4)
    count = [sum(parameter.numel() for parameter in network.parameters()) for network in (smaller, result.network)]
    assert count[0] < count[1]


def test_unknown_policies_and_options_are_named(infected):
    with pytest.raises(UnknownNameError, match="did you mean 'clp'"):
        repair(infected, "clpp")
    with pytest.raises(UnknownNameError, match="option of a CLP that is made already"):
        repair(infected, CLP(None), u=2)
    with pytest.raises(UnknownNameError, match="option of onp"):
        repair(infected, u=3)
    with pytest.raises(BackdoorGymError, match="finetune"):
        repair(infected, finetune=-1)
    with pytest.raises(ModelFileError, match="no file"):
        repair(infected, "absent.safetensors")
    with pytest.raises(UnknownNameError, match="option of random"):
        repair(infected, "random", u=3)
    with pytest.raises(BackdoorGymError, match="number"):
        repair(infected, "clp", u="automatic")


@pytest.mark.slow
def test_the_default_is_the_policy_that_comes_with_the_package(infected):
    result = repair(infected, accuracy_budget=0.05)
    assert result.policy == "onp"
    assert result.outcome == "repaired"
    assert result.pruned
    assert VERDICT_THRESHOLD <= result.verdict <= 1
    assert result.suspected_target == infected.target
    assert result.clean_acc_before - result.clean_acc_after <= 0.05 + 1e-9
    assert result.lost.at_most <= 0.05 + 1e-9
    assert result.report()["verdict"] == result.verdict
    again = repair(infected, accuracy_budget=0.05)
    assert again.pruned == result.pruned
    within_a_point = repair(infected, take_back=False)
    assert within_a_point.arguments["accuracy_budget"] == 0.01
    assert within_a_point.pruned
    assert within_a_point.lost.at_most <= 0.01 + 1e-9
    assert within_a_point.clean_acc_before - within_a_point.clean_acc_after <= 0.01 + 1e-9
    assert repair(infected, "clp").verdict is None


@pytest.mark.slow
def test_a_policy_file_is_taken_by_its_path(infected, tmp_path):
    file = ONP(seed=1).save(tmp_path / "mine.safetensors")
    asked = {"max_steps": 5, "take_back": False}
    result = repair(infected, str(file), accuracy_budget=0.02, look_ahead=False, **asked)
    env = gym.make("BackdoorPrune-v0", infected=infected, max_steps=5, score_samples=0)
    assert result.pruned
    assert result.pruned == repair(infected, ONP.load(file, env), **asked).pruned


@pytest.mark.slow
def test_finetuning_learns_on_the_network_without_its_trigger(infected, monkeypatch):
    """Nothing of the trigger is there to learn from, and the policy is another one afterwards."""
    blind = InfectedModel(infected.network, infected.clean)
    learn, changed = ONP.learn, []

    def watched(self, *arguments, **options):
        before = {name: value.clone() for name, value in self.network.state_dict().items()}
        learn(self, *arguments, **options)
        changed.append(any(not torch.equal(value, before[name]) for name, value in self.network.state_dict().items()))
        return self

    monkeypatch.setattr(ONP, "learn", watched)
    asked = {"max_steps": 5, "take_back": False}
    before = repair(blind, **asked)
    torch.manual_seed(0)
    after = repair(blind, finetune=256, **asked)
    assert after.verdict == before.verdict  # of the signs alone
    assert changed == [True]
    assert after.clean_acc_before - after.clean_acc_after <= 0.01 + 1e-9
    assert after.pruned
    assert repair(blind, finetune=256, **asked).pruned == after.pruned
