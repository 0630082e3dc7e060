"""``detect``: the verdict of ``repair`` alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from backdoor_gym import Detection, InfectedModel, detect, repair
from backdoor_gym.analysis.evidence import SILENT, VERDICT_THRESHOLD
from backdoor_gym.errors import BackdoorGymError, DataError, ModelFileError, UnknownNameError, WriteError
from backdoor_gym.reporting.pictures import LARGEST, SHOWN

from .analysis.test_label_inversion import TARGET, clean, planted


@pytest.fixture
def backdoored() -> InfectedModel:
    return InfectedModel.from_module(planted(True), clean(), name="planted")


@pytest.fixture
def harmless() -> InfectedModel:
    return InfectedModel.from_module(planted(False), clean(), name="harmless")


@pytest.fixture
def silent() -> InfectedModel:
    """Of which nothing can tell: no statistics, and images of few labels."""
    images, labels = clean()
    return InfectedModel.from_module(planted(True), (images[labels < 3], labels[labels < 3]), name="silent")


@pytest.mark.parametrize("model", ["infected", "plain_infected", "backdoored", "harmless", "silent"])
def test_the_figures_are_those_of_a_repair(model, request):
    model = request.getfixturevalue(model)
    detection, result = detect(model), repair(model, "clp", u=100.0, verdict=True)
    assert isinstance(detection, Detection)
    assert detection.probability == result.verdict == detection.evidence.probability
    assert detection.target == result.suspected_target
    assert detection.evidence.signs == result.evidence.signs
    assert detection.suspicious == (result.outcome != "untouched")
    assert detection.infected is model


def test_nothing_is_changed_in_the_network(infected):
    before = {name: value.clone() for name, value in infected.network.state_dict().items()}
    for parameter in infected.network.parameters():
        parameter.grad = None
    modes = [module.training for module in infected.network.modules()]
    asked = [parameter.requires_grad for parameter in infected.network.parameters()]
    detect(infected)
    after = infected.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [module.training for module in infected.network.modules()] == modes
    assert [parameter.requires_grad for parameter in infected.network.parameters()] == asked
    assert all(parameter.grad is None for parameter in infected.network.parameters())


def test_neither_trigger_nor_test_images_are_looked_at(infected):
    blind = InfectedModel(infected.network, infected.clean)
    assert detect(blind).evidence.signs == detect(infected).evidence.signs
    assert detect(blind).target == infected.target


def test_what_it_says(backdoored, harmless, silent):
    threshold = {"threshold": VERDICT_THRESHOLD, "clean_images": 60}
    for model, suspicious, words in (
        (backdoored, True, f"planted: signs of a backdoor, which calls label {TARGET} (probability "),
        (harmless, False, "harmless: no sign of a backdoor (probability "),
    ):
        detection = detect(model)
        assert detection.suspicious == suspicious
        assert str(detection) == f"{words}{detection.probability:.0%})"
        assert detection.report() == {
            "infected": model.name,
            "suspicious": suspicious,
            "probability": detection.probability,
            "target": detection.target,
            "signs": dict(detection.evidence.signs),
            **threshold,
        }
        assert json.loads(json.dumps(detection.report())) == detection.report()
    assert str(detect(silent)) == f"silent: {SILENT}"
    assert (detect(silent).target, detect(silent).report()["signs"]) == (None, {})


def test_from_the_threshold_on_it_is_suspicious(backdoored):
    detection = detect(backdoored)
    assert replace(detection, probability=VERDICT_THRESHOLD).suspicious
    below = replace(detection, probability=VERDICT_THRESHOLD - 1e-6)
    assert not below.suspicious
    assert "calls label" not in str(below)


def test_names_and_places_are_checked(backdoored, tmp_path):
    named = replace(backdoored, name="a\x1b[2Jb")
    assert "\x1b" not in str(detect(named))
    detection = detect(backdoored)
    assert detection == detection
    for place in (3, None):
        with pytest.raises(DataError, match="the file of the picture"):
            detection.save_trigger(place)


def test_a_file_is_read(infected, infected_file):
    assert detect(infected_file).probability == detect(str(infected_file)).probability == detect(infected).probability


@pytest.mark.parametrize("model", ["infected", "backdoored"])
def test_the_picture_is_a_png_of_three_rows(model, request, tmp_path):
    detection = detect(request.getfixturevalue(model))
    written = detection.save_trigger(tmp_path / "deep" / "trigger.png")
    assert written == tmp_path / "deep" / "trigger.png"
    scale = -(-LARGEST // 8)
    with Image.open(written) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "L"
        assert picture.size == (SHOWN * 8 * scale, 3 * 8 * scale)
        rows = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(3, 8, scale, SHOWN, 8, scale)
    shown = rows[:, :, 0, :, :, 0].permute(0, 2, 1, 3).float() / 255
    trigger = detection.evidence.inverted
    for row, images in ((0, trigger.clean), (1, trigger.images)):
        torch.testing.assert_close(shown[row], images[:SHOWN, 0], rtol=0, atol=0.003)
    assert (shown[2] - 0.5).abs().max() > 0.4


@pytest.mark.parametrize(("count", "channels", "size", "scale"), [(3, 3, 20, 5), (40, 1, 100, 1)])
def test_the_picture_of_few_colour_or_large_images(backdoored, tmp_path, count, channels, size, scale):
    detection = detect(backdoored)
    images = torch.rand(count, channels, size, size)
    trigger = replace(detection.evidence.inverted, clean=images, images=images.flip(3))
    shown = replace(detection, evidence=replace(detection.evidence, inverted=trigger))
    with Image.open(shown.save_trigger(tmp_path / "trigger.png")) as picture:
        assert picture.size == (min(count, SHOWN) * size * scale, 3 * size * scale)
        assert picture.mode == ("RGB" if channels == 3 else "L")


def test_without_a_trigger_there_is_no_picture(silent, tmp_path):
    with pytest.raises(DataError, match="no trigger could be inverted in silent"):
        detect(silent).save_trigger(tmp_path / "trigger.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_a_typed_error(backdoored, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        detect(backdoored).save_trigger(tmp_path / "file" / "trigger.png")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("digits-badnet",), {}, UnknownNameError, "did you mean 'digits-badnets'"),
        (("absent.safetensors",), {}, ModelFileError, "no file"),
        ((3,), {}, BackdoorGymError, "3"),
        ((None,), {}, BackdoorGymError, "None"),
        (("digits-badnets",), {"device": "cpux"}, DataError, "device"),
        (("digits-badnets",), {"device": 3}, DataError, "device"),
        (("digits-badnets",), {"watch": 3}, DataError, "watch"),
        (("digits-badnets",), {"data": 3}, BackdoorGymError, "3"),
    ],
)
def test_wrong_arguments_are_typed_errors(arguments, options, error, words):
    with pytest.raises(error, match=words):
        detect(*arguments, **options)


def test_what_is_done_can_be_watched(backdoored):
    told = []
    detect(backdoored, watch=lambda what, done, total: told.append((what, done, total)))
    assert told == [("reading the neurons", 0, None), ("looking for a trigger", 0, None)]


def test_the_command_says_it(run, infected, infected_file, tmp_path):
    expected = detect(infected)
    code, out, _ = run("detect", infected_file)
    assert code == 0
    assert f"tiny: signs of a backdoor, which calls label 3 (probability {expected.probability:.0%})" in out
    for name, value in expected.evidence.signs.items():
        assert any(line.split() == [name, f"{value:.2f}"] for line in out.splitlines())
    picture = tmp_path / "detected" / "tiny.png"
    assert str(picture.relative_to(tmp_path)) in out
    with Image.open(picture) as shown:
        assert shown.format == "PNG"
    assert not (tmp_path / "repaired").exists()


def test_the_command_says_it_in_json(run, infected, infected_file, tmp_path):
    code, out, err = run("detect", infected_file, "--out", "mine/trigger.png", "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out) == {**detect(infected).report(), "files": ["mine/trigger.png"]}
    assert (tmp_path / "mine" / "trigger.png").exists()
    assert not (tmp_path / "detected").exists()


def test_the_command_writes_no_picture_without_a_trigger(run, silent, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "silent_net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 11), nn.ReLU(), nn.Linear(11, 10))\n"
    )
    torch.save(planted(True).state_dict(), "silent.pth")
    np.savez("clean.npz", images=silent.clean.images.numpy(), labels=silent.clean.labels.numpy())
    asked = ("detect", "silent.pth", "--module", "silent_net:Net", "--clean", "clean.npz")
    code, out, _ = run(*asked, "--json")
    told = json.loads(out)
    assert (code, told["suspicious"], told["target"], told["files"]) == (0, False, None, [])
    code, out, _ = run(*asked)
    assert code == 0
    assert "nothing tells whether it has a backdoor" in out
    assert not (tmp_path / "detected").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.safetensors",), "no file"),
        (("digits-badnet",), "did you mean 'digits-badnets'"),
        (("--device", "cpux"), "device"),
        (("--out", "file/deeper.png"), "the folder file cannot be written"),
        (("--out", "."), "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    code, _, err = run("detect", *arguments)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
