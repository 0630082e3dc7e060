import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from backdoor_gym import repair
from backdoor_gym.cli import common
from backdoor_gym.cli.repair import outcome_in_words
from backdoor_gym.errors import DataError, TrainingError
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.models import catalogue
from backdoor_gym.models.foreign import make_module
from backdoor_gym.models.infected import InfectedModel


@pytest.mark.slow
def test_repair_writes_and_prints_what_it_did(run, infected_file, infected, tmp_path):
    code, out, _ = run("repair", infected_file, "--policy", "clp", "--u", "1.5", "--out", "result")
    assert code == 0
    for word in ("ACC", "ASR", "RA", "DER", f"{infected.evaluate().acc:.3f}"):
        assert word in out
    report = json.loads((tmp_path / "result" / "pruned.json").read_text())
    assert report["pruned"] == repair(infected, "clp", u=1.5).pruned
    assert f"Pruned {len(report['pruned'])} of 112 neurons" in out
    again = InfectedModel.load(tmp_path / "result" / "repaired.safetensors")
    assert again.evaluate().acc == report["after"]["acc"]
    assert (tmp_path / "result" / "repair.png").stat().st_size > 10_000
    page = (tmp_path / "result" / "report.html").read_text()
    assert "neurons pruned by clp" in page
    assert f"<code>backdoor-gym repair {infected_file} --policy clp --u 1.5 --out result</code>" in page


@pytest.mark.slow
def test_repair_without_arguments_repairs_the_embedded_model(run, tmp_path):
    code, out, _ = run("repair")
    assert code == 0
    assert "digits-badnets" in out
    assert "Repaired: signs of a backdoor that calls label 3" in out
    assert (tmp_path / "repaired" / "digits-badnets" / "repaired.safetensors").exists()


def test_pruned_neurons_give_their_clean_mean_where_that_is_asked_for(run, infected_file, tmp_path):
    asked = ("--policy", "clp", "--u", "1.5", "--fill", "mean", "--out", "mean", "--quiet")
    assert run("repair", infected_file, *asked)[0] == 0
    expected = repair(infected_file, "clp", u=1.5, fill="mean")
    assert json.loads((tmp_path / "mean" / "pruned.json").read_text())["after"] == expected.after.as_dict()
    code, _, err = run("repair", infected_file, "--fill", "median")
    assert code != 0
    assert 'fill must be "zero" or "mean"' in err


@pytest.mark.slow
def test_neurons_of_a_residual_sum_are_pruned_together_where_that_is_asked_for(run, infected_file, tmp_path):
    for residual in ("channel", "group"):
        asked = ("--policy", "clp", "--u", "1.5", "--residual", residual, "--out", residual, "--quiet")
        assert run("repair", infected_file, *asked)[0] == 0
        expected = repair(infected_file, "clp", u=1.5, residual=residual)
        assert json.loads((tmp_path / residual / "pruned.json").read_text())["pruned"] == expected.pruned
    asked = (
        "--infected",
        infected_file,
        "--policies",
        "clp:1.5",
        "--budgets",
        "own",
        "--jobs",
        "1",
        "--residual",
        "group",
    )
    code, out, _ = run("benchmark", *asked, "--json")
    [cell] = json.loads(out)
    assert (code, cell["conditions"]["residual"], cell["pruned"]) == (0, "group", len(expected.pruned))
    for command in (("repair", infected_file), ("benchmark", "--infected", infected_file)):
        code, _, err = run(*command, "--residual", "groups")
        assert code != 0
        assert "residual mode" in err


@pytest.mark.parametrize(
    ("outcome", "target", "pruned", "said"),
    [
        ("untouched", 3, 0, "No sign of a backdoor (probability of a backdoor 75%): the network is as it came."),
        (
            "repaired", 3, 4,
            "Repaired: signs of a backdoor that calls label 3 (probability of a backdoor 75%), most of which are gone.",
        ),
        (
            "repaired", None, 4,
            "Repaired: signs of a backdoor (probability of a backdoor 75%), most of which are gone.",
        ),
        (
            "unrepairable", 3, 0,
            "Cannot be repaired by pruning within this budget: signs of a backdoor that calls label 3 (probability of a backdoor "
            "75%) stay; the network is as it came. A larger --budget may help.",
        ),
        (
            "unrepairable", None, 4,
            "Cannot be repaired by pruning within this budget: signs of a backdoor (probability of a backdoor 75%) stay; 4 neurons "
            "were pruned all the same. A larger --budget may help.",
        ),
    ],
)  # fmt: skip
def test_the_outcome_in_words(outcome, target, pruned, said):
    assert outcome_in_words(outcome, 0.75, target, pruned) == said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "outcome", "said"),
    [
        (("digits-clean", "--policy", "clp", "--u", 1), 0, "untouched", "No sign of a backdoor"),
        (("tiny", "--policy", "clp", "--u", 0.5), 0, "repaired", "Repaired: signs of a backdoor that calls label 3"),
        (
            ("tiny", "--policy", "clp", "--u", 1.5),
            3,
            "unrepairable",
            "Cannot be repaired by pruning within this budget",
        ),
    ],
)
def test_the_outcome_is_in_words_in_json_and_in_the_exit_code(run, infected_file, options, code, outcome, said):
    asked = ("repair", *(infected_file if word == "tiny" else word for word in options), "--verdict")
    told, out, _ = run(*asked)
    assert (told, said in out) == (code, True)
    told, out, _ = run(*asked, "--json")
    report = json.loads(out)
    assert (told, report["outcome"]) == (code, outcome)
    assert bool(report["pruned"]) == (outcome == "repaired")


def test_what_did_not_help_stays_pruned_and_the_code_is_the_same(run, infected_file, infected, tmp_path):
    asked = ("repair", infected_file, "--policy", "clp", "--u", 1.5, "--verdict", "--no-take-back", "--json")
    code, out, _ = run(*asked)
    assert code == 3
    assert json.loads(out)["pruned"] == repair(infected, "clp", u=1.5).pruned
    assert (tmp_path / "repaired" / "tiny" / "repaired.safetensors").exists()


@pytest.mark.slow
def test_a_clean_network_is_left_alone(run):
    code, out, _ = run("repair", "digits-clean")
    assert code == 0
    assert "No sign of a backdoor (probability of a backdoor " in out
    assert "Pruned 0 of" in out


@pytest.mark.slow
def test_train_makes_a_policy_that_repair_takes(run, infected_file, plain_infected, tmp_path):
    clean = replace(plain_infected, name="clean", trigger=None, target=None, facts={"attack": "clean"})
    clean_file = clean.save(tmp_path / "clean.safetensors")
    arguments = (
        "train", "--infected", infected_file, "--infected", clean_file, "--validate", clean_file, "--steps", "128",
        "--envs", "2", "--warm-epochs", "1", "--out", "mine.safetensors", "--tensorboard", "log",
    )  # fmt: skip
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "mine.safetensors" in out
    assert "warm start" in err
    assert "return" in err
    assert list((tmp_path / "log").rglob("events.*"))
    assert not list(tmp_path.glob("*.checkpoint"))
    assert run("repair", infected_file, "--policy", "mine.safetensors", "--no-verdict")[0] == 0
    code, _, err = run(*arguments)
    assert code == 2
    assert "exists already" in err


def test_repair_says_so_where_no_trigger_is_known(run, infected, tmp_path):
    model = InfectedModel(infected.network, infected.clean, infected.test, architecture=infected.architecture)
    model.save(tmp_path / "blind.safetensors")
    code, out, _ = run("repair", "blind.safetensors", "--policy", "clp", "--u", "auto")
    assert code == 0
    assert "No trigger is known" in out
    assert "unknown" in out


def test_json_output_is_json_alone(run, infected_file):
    code, out, _ = run("repair", infected_file, "--policy", "random", "--budget", "0.02", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["policy"] == "random"
    assert report["clean_acc_before"] - report["clean_acc_after"] <= 0.02 + 1e-9


@pytest.mark.slow
def test_infect_makes_a_model_that_repair_reads(run, tmp_path):
    arguments = (
        "--epochs",
        "2",
        "--width",
        "8",
        "--attack",
        "sig",
        "--attack-option",
        "frequency=2",
        "--out",
        "m.safetensors",
    )
    code, out, _ = run("infect", *arguments, "--json")
    made = json.loads(out)
    assert code == 0
    assert made["attack"] == "sig"
    model = InfectedModel.load(tmp_path / "m.safetensors")
    assert model.trigger.frequency == 2
    assert model.facts["acc"] == made["acc"]
    assert run("repair", "m.safetensors", "--no-verdict")[0] == 0
    code, _, err = run("infect", *arguments)
    assert code == 2
    assert "exists already" in err
    assert run("infect", *arguments[:4], "--out", "model.checkpoint", "--seed", 10**18)[0] == 0
    assert InfectedModel.load(tmp_path / "model.checkpoint").facts["seed"] == 10**18
    assert sorted(path.name for path in tmp_path.glob("*check*")) == ["model.checkpoint"]


def test_infect_takes_every_attack_and_all_to_all_targets(run):
    arguments = ("--width", 4, "--arch-option", "blocks=2", "--epochs", 1, "--json")
    code, out, _ = run("infect", "--attack", "bpp", "--attack-option", "levels=3", "--target", "all-to-all", *arguments)
    assert code == 0
    assert json.loads(out)["attack"] == "bpp"
    code, _, err = run("infect", "--target", "everything", *arguments, "--out", "other.safetensors")
    assert code == 2
    assert "all-to-all" in err
    assert "label-consistent" in run("list")[1]


def test_infect_adapts_to_defences(run):
    arguments = ("--width", 4, "--arch-option", "blocks=2", "--epochs", 1, "--json")
    code, out, _ = run("infect", "--adaptive", "clp", "--adaptive", "bn", *arguments)
    assert code == 0
    assert json.loads(out)["recalibrated"]
    assert "UCLCPenalty" in json.loads(out)["penalty"]
    code, _, err = run("infect", "--adaptive", "clap", *arguments, "--out", "other.safetensors")
    assert code == 2
    assert "did you mean 'clp'" in err


def test_list_and_inspect(run, infected_file):
    code, out, _ = run("list")
    assert code == 0
    assert "digits-badnets" in out
    assert "digits-train/<seed>" in out
    assert "wrn16" in out
    assert run("list", "digits-test/99*")[1].split() == [
        "digits-test/99",
        *(f"digits-test/{n}" for n in range(990, 1000)),
    ]
    assert "digits-badnets" in json.loads(run("list", "--json")[1])["embedded"]
    code, out, _ = run("inspect", infected_file, "--u", "1.5")
    assert code == 0
    assert "blocks.0.conv2" in out
    layers = json.loads(run("inspect", infected_file, "--u", "1.5", "--json")[1])["layers"]
    assert sum(layer["neurons"] for layer in layers) == 112
    assert any(layer["outliers"] for layer in layers)


@pytest.mark.slow
def test_zoo_build_fills_the_cache(run, monkeypatch, tmp_path):
    from backdoor_gym.models import digits_family, family

    monkeypatch.setenv(family.CACHE_VARIABLE, str(tmp_path / "cache"))
    sizes = {seed: digits_family.recipe("digits-train", seed) for seed in range(100)}
    quick = sorted(sizes, key=lambda seed: sizes[seed].width * sizes[seed].blocks)[:2]
    names = [f"digits-train/{seed}" for seed in quick]
    code, out, _ = run("zoo", "build", *names, "--jobs", "2", "--json")
    assert code == 0
    assert json.loads(out) == {"built": 2, "failed": {}}
    times = [family.cache_path(name).stat().st_mtime_ns for name in names]
    assert run("zoo", "build", *names, "--jobs", "1")[0] == 0
    assert [family.cache_path(name).stat().st_mtime_ns for name in names] == times
    assert "(2 in the cache)" in run("list")[1]


def spoiled(infected_file, tmp_path, change):
    tensors, metadata = read_tensors(infected_file)
    change(tensors, metadata)
    write_tensors(tmp_path / "bad.safetensors", tensors, metadata)


def test_bad_input_is_one_line_and_exit_code_2(run, infected_file, tmp_path):
    whole = infected_file.read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[:1000])
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"a": 1}, tmp_path / "pickle.safetensors")
    torch.save({"a": 1}, tmp_path / "model.pth")
    (tmp_path / "file").write_text("")
    spoiled(infected_file, tmp_path, lambda tensors, _: tensors["network.linear.bias"].fill_(float("nan")))
    for arguments, words in (
        (("repair", "absent.safetensors"), "no file"),
        (("repair", "truncated.safetensors"), "truncated"),
        (("repair", "text.safetensors"), "safetensors"),
        (("repair", "pickle.safetensors"), "no state dict"),
        (("repair", "model.pth"), "no state dict"),
        (("repair", "bad.safetensors"), "finite"),
        (("repair", "digits-badnet"), "did you mean 'digits-badnets'"),
        (("repair", "--policy", "clpp"), "did you mean 'clp'"),
        (("repair", "--policy", "bnp", "--threshold", "three"), "a threshold must be"),
        (("repair", "--u", "3"), "--threshold (--u) is an option of clp"),
        (("repair", "--policy", "clp", "--finetune", "10"), "--finetune is an option of onp"),
        (("repair", "--policy", "absent.safetensors"), "no file absent.safetensors"),
        (("train", "--infected", "digits-trian/*"), "digits-trian"),
        (("train", "--most", "3"), "lower envs"),
        (("repair", "--budget", "7"), "accuracy_budget"),
        (("repair", "--out", ""), "names no place"),
        (("infect", "--out", ""), "names no place"),
        (("benchmark", "--infected", "digits-badnets", "--out", ""), "names no place"),
        (("train", "--out", ""), "names no place"),
        (("detect", "--out", ""), "names no place"),
        (("repair", "--device", "cpux"), "device"),
        (("repair", "--out", "file"), "file"),
        (("repair", "--out", "file/deeper"), "file/deeper"),
        (("inspect", "nothing"), "unknown infected model"),
        (("list", "nothing*"), "unknown pattern"),
        (("infect", "--target", "10"), "target 10"),
        (("infect", "--poison-rate", "1.5"), "poison rate"),
        (("infect", "--attack", "badnet"), "did you mean 'badnets'"),
        (("infect", "--arch", "resnet19"), "did you mean 'resnet18'"),
        (("infect", "--attack-option", "size"), "KEY=VALUE"),
        (("infect", "--attack-option", "sise=3"), "size"),
        (("infect", "--clean-images", "5000"), "clean images"),
        (("infect", "--arch", "vgg16"), "cannot take images"),
        (("infect", "--arch-option", "width=abc"), "width of small_cnn must be a whole number"),
        (("infect", "--arch-option", "width=-1"), "cannot be built"),
        (("infect", "--arch-option", "num_classes=5"), "num_classes"),
        (("infect", "--attack-option", "row=1.5"), "row of badnets must be a whole number"),
        (("infect", "--attack", "sig", "--attack-option", "amplitude=abc"), "amplitude of sig must be a number"),
        (("infect", "--device", "cpux"), "device"),
        (("zoo", "build", "digits-badnets"), "not made on demand"),
        (("repair", "--budgit", "1"), "--budgit"),
    ):
        code, out, err = run(*arguments)
        assert code == 2, (arguments, out, err)
        assert words in err, (arguments, err)
        assert "Traceback" not in err
        if not {"--budgit", ""}.intersection(arguments):  # the command line's own parser draws a box
            assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("command", ["detect", "repair", "infect"])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(run, monkeypatch, tmp_path, command):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    def work(*_, **__):
        pytest.fail("the work began")

    monkeypatch.setattr(common, "TemporaryFile", refuse)
    monkeypatch.setattr("backdoor_gym.repairing.repair", work)
    monkeypatch.setattr("backdoor_gym.models.infecting.infect", work)
    monkeypatch.setattr("backdoor_gym.detecting.detect", work)
    code, _, err = run(command, "--out", tmp_path / "closed" / "result")
    assert code == 2
    assert "cannot be written: Permission denied" in err


COMMANDS = ("detect", "repair", "benchmark", "train", "infect", "list", "inspect", "zoo build")


@pytest.mark.filterwarnings("default::UserWarning")
def test_where_logits_come_from_is_told(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dict_net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))\n"
        "    def forward(self, images):\n        return {'out': super().forward(images)}\n"
    )
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).state_dict(), "n.pth")
    code, _, err = run("inspect", "n.pth", "--module", "dict_net:Net", "--clean", "digits")
    assert code == 0
    assert "The logits are taken from entry 'out' of the network's answer" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("onp", "--u", 3), "--threshold (--u) is an option of clp, bnp"),
        (("clp", "--finetune", 8), "--finetune is an option of onp, and not of clp"),
    ],
)
def test_options_of_other_policies(run, options, said):
    code, _, err = run("repair", "--policy", *options)
    assert code == 2
    assert said in err


def test_help_is_quick_and_complete():
    code = (
        "import sys; from backdoor_gym.cli import main; sys.argv = ['backdoor-gym', *sys.argv[1:]]\n"
        "try: main()\nfinally: print([name for name in ('torch', 'matplotlib', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-m", "backdoor_gym.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command.split()[0] in done.stdout for command in COMMANDS)
    done = subprocess.run([sys.executable, "-c", code, "repair", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_tells_the_exit_codes_and_how_to_use_it_in_scripts(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "Exit codes: 0 done" in out
    if command:
        assert "--json" in out
        assert "--quiet" in out


QUICK = {
    "detect": (),
    "repair": ("digits-badnets", "--policy", "clp", "--out", "repaired"),
    "benchmark": ("--infected", "digits-badnets", "--policies", "random", "--budgets", "0.02", "--jobs", "1"),
    "train": (
        "--infected", "digits-badnets", "--validate", "digits-clean", "--steps", "8", "--envs", "1", "--warm-epochs", "0",
    ),
    "infect": ("--epochs", "1", "--width", "8"),
    "list": (),
    "inspect": (),
    "zoo build": ("digits-train/0", "--jobs", "1"),
}  # fmt: skip


@pytest.fixture
def cached(monkeypatch, plain_infected):
    """The model that ``zoo build`` is asked for is there already."""
    monkeypatch.setattr("backdoor_gym.models.family.load", lambda name, progress=False: plain_infected)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_alone_on_standard_output_and_quiet_is_quiet(run, cached, command):
    code, out, _ = run(*command.split(), *QUICK[command], "--json")
    assert code == 0
    assert json.loads(out)
    again = ("--force",) if command in ("train", "infect") else ()
    assert run(*command.split(), *QUICK[command], *again, "--quiet") == (0, "", "")
    code, out, err = run(*command.split(), *QUICK[command], *again, "--quiet", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)


def test_what_a_library_prints_does_not_spoil_the_json(run, monkeypatch):
    def careless(*arguments, **own):
        print("loading ...")
        warnings.warn("old format", UserWarning, stacklevel=1)
        return load_specified(*arguments, **own)

    load_specified = catalogue.load_specified
    monkeypatch.setattr(catalogue, "load_specified", careless)
    code, out, err = run("inspect", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "digits-badnets"
    assert "loading ..." in err
    assert run("inspect", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("error", "code"), [(TrainingError("no luck"), 1), (DataError("no"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(run, monkeypatch, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(catalogue, "load_specified", fail)
    found, out, err = run("inspect", "--quiet")
    assert (found, out) == (code, "")
    assert str(error) in err


def test_progress_is_shown_on_standard_error(run):
    code, out, err = run("infect", *QUICK["infect"])
    assert code == 0
    assert "training" in err
    assert "training" not in out


def test_what_needs_ray_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (
        ("train", "--ray", "auto", "--infected", "digits-badnets"),
        ("benchmark", "--ray", "auto", "--infected", "digits-badnets", "--policies", "random"),
        ("infect", "--ray", "auto"),
    ):
        code, _, err = run(*command)
        assert code == 2
        assert "backdoor-gym[ray]" in err


OWN_NETWORK = """
import torch
from safetensors.torch import load_file
from torch import nn
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )
"""


@pytest.mark.slow
def test_a_network_of_ones_own_is_repaired_and_inspected(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_net.py").write_text(OWN_NETWORK)
    network = make_module("their_net:Net")
    torch.save({"model": nn.DataParallel(network).state_dict(), "note": ExecuteError()}, "own.pth")
    own = ("own.pth", "--module", "their_net:Net", "--clean", "digits", "--clean-images", 50)
    code, out, err = run("repair", *own, "--policy", "clp", "--u", "0.5", "--mean", "0.5", "--std", "0.5")
    assert code == 0, err
    assert "Your own class takes the repaired weights" in out
    assert "tests.test_cli.ExecuteError" in err
    assert "of the clean images before the repair" in err
    weights = load_file(tmp_path / "repaired" / "own" / "repaired.safetensors")
    make_module("their_net:Net").load_state_dict(weights)
    assert not torch.equal(weights["1.weight"], network[1].weight)
    layers = json.loads(run("inspect", *own, "--json")[1])["layers"]
    assert [layer["layer"] for layer in layers] == ["0"]
    compared = ("--policies", "clp:0.5,random", "--budgets", "0.02", "--jobs", "1", "--json")
    code, out, err = run(
        "benchmark", "--infected", "own.pth,digits-clean", *own[1:], "--mean", "0.5", "--std", "0.5", *compared
    )
    assert code == 0, err
    cells = {(cell["model"], cell["policy"]): cell for cell in json.loads(out)}
    assert set(cells) == {(model, policy) for model in ("own", "digits-clean") for policy in ("clp:0.5", "random")}
    assert cells["own", "clp:0.5"]["neurons"] == 8
    assert (
        cells["own", "clp:0.5"]["acc_before"]
        == json.loads(run("repair", *own, "--mean", "0.5", "--std", "0.5", "--json")[1])["before"]["acc"]
    )
    for arguments, words in (
        (("repair", "own.pth"), "--arch NAME or --module"),
        (("repair", "own.pth", "--module", "their_net:Net"), "--clean"),
        (("repair", "own.pth", "--module", "their_net", "--clean", "digits"), "package.module:factory"),
        (("repair", *own, "--mean", "0.5"), "--mean and --std"),
        (("repair", *own, "--mean", "a", "--std", "1"), "numbers, one a channel"),
        (("repair", *own, "--image-size", "big"), "HEIGHTxWIDTH"),
        (("repair", "own.pth", "--arch", "small_cnn", "--clean", "digits"), "missing"),
        (("repair", "digits-badnets", "--clean", "digits"), "complete as it is"),
        (("benchmark", "--infected", "digits-badnets", "--clean", "digits"), "clean is for a network of your own"),
        (("benchmark", "--infected", "own.pth", "--module", "their_net:Net"), "--clean"),
        (("benchmark", "--infected", "own.pth", "--mean", "0.5"), "--mean and --std"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert words in err
        assert len(err.strip().splitlines()) == 1, err


class ExecuteError(Exception):
    """What a checkpoint may hold beside the weights."""


EVIL = "a\x1b]0;title\x07\nerror: all is well [/red] [bold]"


@pytest.fixture
def renamed(infected_file, tmp_path):
    """Writes the model again under another name, with facts to match."""

    def write(name):
        tensors, metadata = read_tensors(infected_file)
        write_tensors(tmp_path / "in" / "model.safetensors", tensors, {**metadata, "name": name, "facts": {name: name}})
        return tmp_path / "in" / "model.safetensors"

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", ["..", "", ".", "../../x", "/x", EVIL])
def test_the_name_of_a_model_chooses_no_folder(run, renamed, tmp_path, name):
    code, out, errors = run("repair", renamed(name), "--policy", "random")
    assert code == 0, errors
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parts[0] for path in written} == {"in", "repaired"}
    assert {len(path.parts) for path in written if path.parts[0] == "repaired"} == {3}
    assert "\x1b" not in out + errors
    assert "\nerror: all" not in out + errors


def test_texts_of_a_file_are_shown_as_they_are_and_harmless(run, renamed):
    code, out, errors = run("inspect", renamed(EVIL))
    assert code == 0, errors
    assert "[/red] [bold]" in out
    assert "\x1b" not in out + errors
    assert "\nerror: all" not in out + errors
