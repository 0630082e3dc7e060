"""Networks of transformers and timm, out of folders made here: small, with random weights, offline."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from backdoor_gym import load_infected, repair
from backdoor_gym.errors import BackdoorGymError, DataError, ModelFileError, WeightsError
from backdoor_gym.models import pretrained
from backdoor_gym.models.image_settings import image_size, normalisation
from backdoor_gym.networks.preprocessing import Normalise

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

#: Small configs of each kind, and the side of their images.
TRANSFORMER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 4,
}  # fmt: skip
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
KINDS = {
    "ResNet": {**STAGES, "layer_type": "basic"},
    "ViT": TRANSFORMER,
    "DeiT": TRANSFORMER,
    "Beit": {**TRANSFORMER, "use_relative_position_bias": True},
    "Dinov2": {**TRANSFORMER, "use_swiglu_ffn": True},
    "Swin": {
        "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 16, "patch_size": 2,
    },
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "MobileNetV2": {
        "depth_multiplier": 0.1, "depth_divisible_by": 4, "min_depth": 4, "finegrained_output": False, "image_size": 32,
    },
    "MobileViT": {
        "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2, "image_size": 32,
    },
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 32, "hidden_dim": 320},
    "RegNet": {**STAGES, "groups_width": 4},
    "Levit": {
        "image_size": 64, "hidden_sizes": [16] * 3, "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [4] * 3,
        "attention_ratio": [2] * 3, "mlp_ratio": [2] * 3,
    },
}  # fmt: skip
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NAMES = ["tabby cat", "Dog", "bird", "great white shark"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whatever asks the Hub fails."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def make(folder: Path, kind: str = "ResNet", half: bool = False, **settings) -> nn.Module:
    """A folder as ``save_pretrained`` writes it, with its preprocessing beside it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind], id2label=dict(enumerate(NAMES)))
    network = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    for name, value in network.state_dict().items():
        if value.is_floating_point() and value.ndim:  # else attention and biases that begin as zeros say nothing
            value.copy_(torch.rand(value.shape) * 0.5 + (0.5 if "running_var" in name else -0.25))
    (network.half() if half else network).save_pretrained(folder)
    side = KINDS[kind].get("image_size", 16)
    described = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}, "do_resize": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps({**described, **settings}))
    return network.float()


def some(side: int = 16, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)), torch.arange(count) % len(
        NAMES
    )


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        answer = network(images)
    return answer if isinstance(answer, torch.Tensor) else answer.logits


@pytest.mark.parametrize(("kind", "half"), [*((kind, False) for kind in KINDS), ("ResNet", True), ("ViT", True)])
def test_a_folder_is_read_and_written_back_as_it_was(kind, half, tmp_path):
    folder, again = tmp_path / "theirs", tmp_path / "again"
    original = make(folder, kind, half)
    clean = some(KINDS[kind].get("image_size", 16))
    model = load_infected(folder, clean=clean)
    expected = logits(original, Normalise(MEAN, STD)(clean[0]))
    assert expected.std() > 1e-3
    assert torch.allclose(logits(model.network, clean[0]), expected, atol=1e-5)
    assert (model.name, model.checkpoint, model.num_classes) == ("theirs", str(folder), len(NAMES))
    assert type(model.module) is type(original)
    with torch.no_grad():  # as a repair would
        next(value for name, value in model.module.named_parameters() if "classifier" in name)[0] = 0
    again.mkdir()
    files = model.layout.save(again, model.module)
    assert [file.name for file in files] == ["model.safetensors", "config.json", "preprocessor_config.json"]
    assert sorted(file.name for file in again.iterdir()) == sorted(file.name for file in files)
    for file in files[1:]:
        assert file.read_bytes() == (folder / file.name).read_bytes()
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 1
    theirs = transformers.AutoModelForImageClassification.from_pretrained(again).float().eval()
    repaired = logits(theirs, Normalise(MEAN, STD)(clean[0]))
    assert torch.allclose(repaired, logits(model.network, clean[0]), atol=1e-6)
    assert not torch.allclose(repaired, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_repair_is_saved_in_the_form_that_the_network_came_in(kind, tmp_path):
    make(tmp_path / "theirs", kind)
    clean = some(KINDS[kind].get("image_size", 16))
    result = repair(load_infected(tmp_path / "theirs", clean=clean), "random", None, max_steps=3)
    assert len(result.pruned) == 3
    written = [file.name for file in result.save(tmp_path / "repaired")]
    assert written[:3] == ["model.safetensors", "config.json", "preprocessor_config.json"]
    assert not (tmp_path / "repaired" / "repaired.safetensors").exists()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "repaired").eval()
    repaired = logits(theirs, Normalise(MEAN, STD)(clean[0]))
    assert torch.allclose(repaired, logits(result.network, clean[0]), atol=1e-6)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "repaired"))
    assert [name for name in before if not torch.equal(before[name], after[name])]


def test_weights_in_several_files(tmp_path):
    original = make(tmp_path, "ViT")
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(weights)
    files = {f"model-0000{number + 1}-of-00002.safetensors": names[number::2] for number in range(2)}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in files.items() for name in held}}))
    clean = some()
    expected = logits(original, Normalise(MEAN, STD)(clean[0]))
    assert torch.allclose(logits(load_infected(tmp_path, clean=clean).network, clean[0]), expected, atol=1e-5)
    for name in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
        with pytest.raises(ModelFileError, match="of its own folder"):
            load_infected(tmp_path, clean=clean)


def test_a_folder_with_a_pickle_alone_is_not_opened(tmp_path, monkeypatch):
    make(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin is a pickle and never opened.*save_pretrained"):
        load_infected(tmp_path, clean=some())
    torch.save({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="is a pickle, whatever its name says"):
        load_infected(tmp_path, clean=some())


def test_code_that_a_folder_names_is_never_run(tmp_path):
    make(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Net: pass\n")
    edit(tmp_path / "config.json", auto_map={"AutoModelForImageClassification": "evil.Net", "AutoConfig": "evil.Net"})
    model = load_infected(tmp_path, clean=some())
    assert model.facts["unread"] == ["evil.Net"]
    edit(tmp_path / "config.json", model_type="evil", architectures=["Net"])
    with pytest.raises(
        ModelFileError, match=r"describes Net, which is no image classifier.*code that it brings is never run"
    ):
        load_infected(tmp_path, clean=some())
    assert not (tmp_path / "run").exists()


def test_how_a_network_is_run_is_not_taken_from_a_folder(tmp_path):
    """Attention named as a repository of the Hub would be fetched and imported; another answer would not be logits."""
    make(tmp_path, "ViT")
    how = {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel", "return_dict": False}
    edit(tmp_path / "config.json", **how, dtype="bfloat16", torch_dtype="bfloat16")
    model = load_infected(tmp_path, clean=some())
    assert model.num_classes == len(NAMES)
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"architectures": ["ResNetModel"]}, ModelFileError, "describes ResNetModel, which is no image classifier"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, ModelFileError, "BertModel, which is no image"),
        ({"model_type": ["resnet"]}, ModelFileError, "no image classifier"),
        ({"architectures": "ResNet"}, ModelFileError, "describes ResNet, which is no image classifier"),
        ({"architectures": [3]}, ModelFileError, "describes 3, which is no image classifier"),
        ({"id2label": ["a", "b"]}, ModelFileError, "id2label must be an object"),
        ({"id2label": {"a": 0}}, ModelFileError, "id2label must name the class of each number, not of 'a'"),
        ({"id2label": {"1": "a", "01": "b"}}, ModelFileError, "id2label names class 1 more than once"),
        ({"architecture": "resnet18", "pretrained_cfg": [1]}, ModelFileError, "pretrained_cfg must be an object"),
        ({"depths": [1, 1, 10**9]}, ModelFileError, "depths is 1000000000; 1000 is the most"),
        ({"depths": [1] * 2000}, ModelFileError, "depths has 2000 entries; 1000 is the most"),
        ({"image_size": 10**9}, ModelFileError, "image_size is 1000000000; 1024 is the most"),
        ({"vision": {"image_size": [64, 10**400]}}, ModelFileError, "image_size is .* 1024 is the most"),
        ({"padding": 1000}, ModelFileError, "padding is 1000; 64 is the most"),
        ({"hidden_sizes": [8, 10**7]}, WeightsError, "describes a network of .* numbers and holds"),
        ({"hidden_sizes": [8, 24]}, WeightsError, r"\d of another shape \("),
        ({"depths": [1, 2]}, WeightsError, "missing"),
        ({"hidden_act": "no such"}, ModelFileError, "that can be built"),
        ({"quantization_config": {"bits": 4}}, ModelFileError, "quantised"),
    ],
)
def test_configs_that_cannot_be_used(entries, error, message, tmp_path):
    make(tmp_path)
    edit(tmp_path / "config.json", **entries)
    with pytest.raises(error, match=message) as raised:
        load_infected(tmp_path, clean=some())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "key", ["architectures", "model_type", "id2label", "hidden_act", "architecture", "hidden_sizes"]
)
def test_what_a_config_says_at_length_is_cut(key, tmp_path):
    make(tmp_path)
    edit(tmp_path / "config.json", **{key: "x" * 10**6})
    with pytest.raises(BackdoorGymError) as raised:
        load_infected(tmp_path, clean=some(), preprocess=lambda images: images)
    assert len(str(raised.value)) < 1000


def test_a_network_that_is_long_in_the_making_is_refused_on_the_way(tmp_path, monkeypatch):
    """LeViT goes through all pairs of places in an image."""
    monkeypatch.setattr("backdoor_gym.files.sizes.FEW_CALLS", 300_000)
    make(tmp_path, "Levit")
    assert load_infected(tmp_path, clean=some(64)).num_classes == len(NAMES)
    edit(tmp_path / "config.json", image_size=1024)
    start = time.monotonic()
    with pytest.raises(WeightsError, match="more steps of its making than the file"):
        load_infected(tmp_path, clean=some(64))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("kind", "entries"), [("Levit", {"padding": 64}), ("MobileViT", {"patch_size": 1000})])
def test_a_pass_takes_bearable_memory_and_work(kind, entries, tmp_path):
    """Each of four convolutions makes the image wider; features are brought to a multiple of the patches."""
    make(tmp_path, kind)
    edit(tmp_path / "config.json", **entries)
    with pytest.raises(WeightsError, match="numbers at once, and"):
        load_infected(tmp_path, clean=some(KINDS[kind]["image_size"]))


def test_weights_that_are_not_finite_or_too_many(tmp_path):
    make(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "pooler.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    model = load_infected(tmp_path, clean=some())
    assert model.facts["unused"] == ["pooler.weight"]
    (tmp_path / "again").mkdir()
    model.layout.save(tmp_path / "again", model.module)
    assert {"pooler.weight", *weights} == set(load_file(tmp_path / "again" / "model.safetensors"))
    name = next(name for name, value in weights.items() if value.is_floating_point())
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="not finite"):
        load_infected(tmp_path, clean=some())


def test_damaged_files(tmp_path):
    make(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ModelFileError, match="truncated"):
        load_infected(tmp_path, clean=some())
    (tmp_path / "config.json").rename(tmp_path / "configuration.json")
    with pytest.raises(ModelFileError, match=r"is a folder without config\.json"):
        load_infected(tmp_path, clean=some())
    for text in ("{", "[]", '"text"'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelFileError, match="JSON"):
            load_infected(tmp_path, clean=some())


def test_what_is_given_wins_over_the_file(tmp_path):
    original = make(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    images, labels = some()
    with pytest.raises(DataError, match=r"has no preprocessor_config\.json.*--mean and --std"):
        load_infected(tmp_path, clean=(images, labels))
    model = load_infected(tmp_path, clean=(images, labels), preprocess=Normalise(STD, MEAN))
    assert torch.allclose(logits(model.network, images), logits(original, Normalise(STD, MEAN)(images)), atol=1e-5)
    assert "preprocessing" not in model.facts
    with pytest.raises(DataError, match="brings no images"):
        load_infected(tmp_path)
    with pytest.raises(DataError, match="says itself which network it is; architecture is"):
        load_infected(tmp_path, clean=(images, labels), architecture="resnet18")


def pictures(folder: Path, names: list[str], side: int) -> None:
    """A picture of its own grey in each subfolder."""
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (side, side), (10 * place, 0, 0)).save(folder / name / "one.png")


def test_subfolders_with_the_names_of_the_classes(tmp_path):
    make(tmp_path / "theirs", size=16)
    pictures(tmp_path / "named", ["bird", "dog", "Great_White_Shark", "tabby_cat"], 20)
    model = load_infected(tmp_path / "theirs", clean=tmp_path / "named", test=tmp_path / "named")
    assert model.clean.images.shape == (4, 3, 16, 16)
    # In the order that a folder is read in, as text: capital letters come first.
    assert model.clean.labels.tolist() == [3, 2, 1, 0]
    assert model.test.labels.tolist() == [3, 2, 1, 0]
    pictures(tmp_path / "some", ["dog", "bird"], 20)
    assert load_infected(tmp_path / "theirs", clean=tmp_path / "some").clean.labels.tolist() == [2, 1]
    pictures(tmp_path / "other", ["bird", "dog", "shark", "tabby cat"], 20)
    assert load_infected(tmp_path / "theirs", clean=tmp_path / "other").clean.labels.tolist() == [0, 1, 2, 3]
    pictures(tmp_path / "fewer", ["bird", "shark"], 20)
    with pytest.raises(DataError, match="have 2 classes and the network 4"):
        load_infected(tmp_path / "theirs", clean=tmp_path / "fewer")
    pictures(tmp_path / "numbers", ["3", "1"], 20)
    assert load_infected(tmp_path / "theirs", clean=tmp_path / "numbers").clean.labels.tolist() == [1, 3]
    edit(tmp_path / "theirs" / "config.json", id2label={"0": "3", "1": "2", "2": "1", "3": "0"})
    assert load_infected(tmp_path / "theirs", clean=tmp_path / "numbers").clean.labels.tolist() == [2, 0]


def test_a_name_of_two_classes_is_no_label(tmp_path):
    make(tmp_path / "theirs", size=16)
    edit(tmp_path / "theirs" / "config.json", id2label={"0": "crane", "1": "dog", "2": "Crane", "3": "cat"})
    pictures(tmp_path / "clear", ["dog", "cat"], 16)
    assert load_infected(tmp_path / "theirs", clean=tmp_path / "clear").clean.labels.tolist() == [3, 1]
    pictures(tmp_path / "unclear", ["dog", "crane"], 16)
    with pytest.raises(DataError, match=r"subfolder crane of .* may be any of the classes \[0, 2\]"):
        load_infected(tmp_path / "theirs", clean=tmp_path / "unclear")
    pictures(tmp_path / "numbers", ["1", "2"], 16)
    assert load_infected(tmp_path / "theirs", clean=tmp_path / "numbers").clean.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": 224}, (224, 224)),
        ({"size": {"height": 24, "width": 32}}, (24, 32)),
        ({"size": [24, 32]}, (24, 32)),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224)),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
            (224, 224),
        ),
        ({"size": 288, "crop_size": 256}, (256, 256)),
        (
            {"size": {"height": 24, "width": 24}, "crop_size": {"height": 20, "width": 20}, "do_center_crop": False},
            (24, 24),
        ),
        ({"size": 24, "do_resize": False}, (20, 20)),
        ({}, (20, 20)),
        (None, (20, 20)),
    ],
)
def test_the_image_size_that_a_file_says(settings, size):
    assert image_size(settings, {"image_size": 20}, Path("there")) == size
    assert image_size(None, {}, Path("there")) is None


@pytest.mark.parametrize("size", [{"longest_edge": 24}, "24", 0, 10**6, [1, 2, 3], {"height": 24}, 24.5])
def test_image_sizes_that_are_not_understood(size):
    with pytest.raises(DataError, match=r"image size in there is not understood .* --image-size"):
        image_size({"size": size}, {}, Path("there"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViT", {"image_mean": MEAN, "image_std": STD, "do_normalize": True}),
        ("ViT", {"do_normalize": False}),
        ("ViT", {"image_mean": MEAN, "image_std": STD, "do_rescale": False}),
        ("ConvNext", {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 127.5}),
        ("EfficientNet", {"image_mean": MEAN, "image_std": STD}),
        ("EfficientNet", {"image_mean": MEAN, "image_std": STD, "include_top": False}),
        ("EfficientNet", {"image_mean": MEAN, "image_std": STD, "rescale_offset": True, "rescale_factor": 1 / 127.5}),
        (
            "EfficientNet",
            {"do_normalize": False, "include_top": False, "rescale_offset": True, "rescale_factor": 1 / 127.5},
        ),
        ("MobileViT", {}),
        ("MobileViT", {"do_flip_channel_order": False}),
    ],
)
def test_images_are_made_what_the_library_makes_of_them(kind, settings):
    """Against the image processors of transformers, with settings as they write and as files have them."""
    name = f"{kind}ImageProcessor"
    theirs = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    processor = theirs(**settings, do_resize=False, do_center_crop=False)
    expected = torch.as_tensor(processor(list(pixels.numpy()), return_tensors="pt")["pixel_values"]).float()
    written = {key: value for key, value in processor.to_dict().items() if value is not None}
    for said in (written, {**settings, "image_processor_type": f"{kind}ImageProcessor"}):
        made = normalisation(said, Path("there"))
        images = pixels.float() / 255
        assert torch.allclose(images if made is None else made(images), expected, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": True},
        {"image_mean": ["a"], "image_std": [1]},
        {"image_mean": [0.5], "image_std": [0.0]},
        {"rescale_factor": "x"},
        {"rescale_factor": 0},
        {"do_color_quantize": True},
    ],
)
def test_normalisations_that_are_not_understood(settings):
    with pytest.raises(DataError):
        normalisation(settings, Path("there"))


def test_the_hub_is_asked_for_json_and_safetensors_alone(tmp_path, monkeypatch):
    make(tmp_path / "snapshot")
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load_infected("hf:owner/some-net@v1.0", clean=some())
    assert (model.name, model.checkpoint) == ("some-net", "hf:owner/some-net@v1.0")
    assert asked[0][:2] == ("owner/some-net", "v1.0")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked[0][2])
    load_infected(tmp_path / "snapshot", clean=some())
    for name in ("owner/some-net", "some-net"):  # no hf: in front
        with pytest.raises(BackdoorGymError):
            load_infected(name, clean=some())
    assert len(asked) == 1
    for name in ("hf:", "hf:net", "hf:../net/more", "hf:owner/net/more"):
        with pytest.raises(ModelFileError, match="is named hf:owner/name"):
            load_infected(name, clean=some())


def test_the_hub_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelFileError, match="hf:owner/net cannot be fetched from the Hub and was not fetched before"
    ) as raised:
        load_infected("hf:owner/net", clean=some())
    assert "\n" not in str(raised.value)


def test_missing_extras_are_named(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"pip install 'backdoor-gym\[transformers\]'"):
        load_infected(tmp_path, clean=some())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DataError, match=r"pip install 'backdoor-gym\[timm\]'"):
        load_infected(tmp_path / "model.safetensors", timm="resnet18", clean=some())


def test_neither_is_imported_before_it_is_needed():
    code = "import sys, backdoor_gym.cli, backdoor_gym.models.catalogue; print({'transformers', 'timm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_command_line_takes_a_folder(run, tmp_path):
    make(tmp_path / "theirs", size=16)
    pictures(tmp_path / "clean", NAMES, 20)
    arguments = ("repair", "theirs", "--clean", "clean", "--policy", "random", "--budget", "1")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "normalised with mean 0.4,0.5,0.6 and std 0.2,0.25,0.3" in err
    assert "holds the network in the form that it came in" in out
    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "repaired" / "theirs")
    assert isinstance(network, transformers.ResNetForImageClassification)
    code, out, err = run("inspect", "theirs", "--clean", "clean", "--json")
    assert code == 0, err
    assert json.loads(out)["neurons"] == 72


@pytest.fixture
def timm():
    """The library, where it can be imported: it needs torchvision."""
    return pytest.importorskip("timm")


TIMM = {"resnet18": (32, {}), "vit_tiny_patch16_224": (32, {"img_size": 32}), "efficientnet_lite0": (32, {})}


@pytest.mark.parametrize("name", TIMM)
def test_weights_of_timm(name, timm, tmp_path):
    side, options = TIMM[name]
    torch.manual_seed(0)
    original = timm.create_model(name, num_classes=5, **options).eval()
    save_file({f"module.{key}": value for key, value in original.state_dict().items()}, tmp_path / "own.safetensors")
    images, labels = some(side)
    model = load_infected(tmp_path / "own.safetensors", timm=name, options=options, clean=(images, labels))
    told = original.pretrained_cfg
    expected = logits(original, Normalise(told["mean"], told["std"])(images))
    assert torch.allclose(logits(model.network, images), expected, atol=1e-5)
    assert model.num_classes == 5
    model = load_infected(
        tmp_path / "own.safetensors", timm=name, options=options, clean=(images, labels), preprocess=torch.nn.Identity()
    )
    assert torch.allclose(logits(model.network, images), logits(original, images), atol=1e-5)
    model = load_infected(
        tmp_path / "own.safetensors", timm=name, options=options, clean=(images, labels), preprocess=torch.nn.Identity()
    )
    weights = load_file(repair(model, "random", None, max_steps=2).save(tmp_path / "repaired")[0])
    original.load_state_dict(weights)


def test_a_folder_of_timm(timm, tmp_path):
    original = timm.create_model("resnet18", num_classes=4).eval()
    save_file(dict(original.state_dict()), tmp_path / "model.safetensors")
    described = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "num_classes": 4}
    config = {"architecture": "resnet18", "num_classes": 4, "pretrained_cfg": described, "label_names": NAMES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pictures(tmp_path / "clean", ["bird", "dog"], 40)
    model = load_infected(tmp_path, clean=tmp_path / "clean")
    assert model.clean.images.shape == (2, 3, 32, 32)
    assert model.clean.labels.tolist() == [2, 1]
    expected = logits(original, Normalise(MEAN, STD)(model.clean.images))
    assert torch.allclose(logits(model.network, model.clean.images), expected, atol=1e-5)
    (tmp_path / "again").mkdir()
    assert (
        model.layout.save(tmp_path / "again", model.module)[1].read_bytes() == (tmp_path / "config.json").read_bytes()
    )
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in original.state_dict().items())
    for arguments in ({"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"no_such": 1}):
        edit(tmp_path / "config.json", model_args=arguments)
        with pytest.raises(DataError):
            load_infected(tmp_path, clean=tmp_path / "clean")
    for name in ("hf-hub:owner/name", "local-dir:/tmp", "no_such_net", 3):
        edit(tmp_path / "config.json", model_args={}, architecture=name)
        with pytest.raises(DataError, match="has no network"):
            load_infected(tmp_path, clean=tmp_path / "clean")


def test_timm_names_are_for_weights_alone(timm, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "own.safetensors")
    with pytest.raises(DataError, match=r"timm .* has no network 'resnet1'"):
        load_infected(tmp_path / "own.safetensors", timm="resnet1", clean=some())
    with pytest.raises(DataError, match="belongs to a network of timm, to an architecture"):
        load_infected(tmp_path / "own.safetensors", timm="resnet18", architecture="resnet18", clean=some())
    with pytest.raises(WeightsError, match="missing"):
        load_infected(tmp_path / "own.safetensors", timm="resnet18", clean=some())


def test_layouts_are_kept_apart_from_other_models(infected):
    assert infected.layout is None
    assert pretrained.is_pretrained("hf:owner/name")
    assert not pretrained.is_pretrained("digits-badnets")
