import pytest
import torch

from backdoor_gym.errors import DataError, UnknownNameError
from backdoor_gym.networks import ARCHITECTURES, build

from ..tiny import OPTIONS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_width_scales_and_logits_come_out(name):
    sizes = []
    for width in (8, 16):
        network = build(name, num_classes=7, in_channels=1, **{**OPTIONS[name], "width": width}).eval()
        assert network(torch.rand(2, 1, 8, 8)).shape == (2, 7)
        sizes.append(sum(parameter.numel() for parameter in network.parameters()))
    assert sizes[1] > 1.8 * sizes[0]


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "lenet", "densenet", "mobilenet_v3_small", "convnext", "vit"])
def test_colour_images_of_cifar_size_need_no_options(name):
    assert build(name, 10, 3, width=12).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.17),
        ("resnet34", 21.28),
        ("resnet50", 23.52),
        ("preact_resnet18", 11.17),
        ("vgg16", 14.73),
        ("wrn16", 0.175),
        ("densenet", 0.769),
    ],
)
def test_published_widths_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(name, 10, 3).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


#: Of the checkpoints for 1,000 classes that everybody uses: number of parameters, and some of their names with shapes.
CHECKPOINTS = {
    "resnet18_imagenet": (11_689_512, {"layer2.0.downsample.1.running_mean": (128,), "fc.bias": (1000,)}),
    "resnet34_imagenet": (21_797_672, {"layer3.5.bn2.weight": (256,)}),
    "resnet50_imagenet": (25_557_032, {"layer1.0.downsample.0.weight": (256, 64, 1, 1)}),
    "vgg19_bn": (143_678_248, {"features.50.running_var": (512,), "classifier.6.weight": (1000, 4096)}),
    "densenet121": (7_978_856, {"features.denseblock3.denselayer24.conv2.weight": (32, 128, 3, 3)}),
    "densenet161": (28_681_000, {"features.transition2.conv.weight": (384, 768, 1, 1), "features.norm5.bias": (2208,)}),
    "mobilenet_v2": (3_504_872, {"features.1.conv.1.weight": (16, 32, 1, 1), "features.18.1.bias": (1280,)}),
    "mobilenet_v3_large": (5_483_032, {"features.4.block.2.fc1.weight": (24, 72, 1, 1), "classifier.3.bias": (1000,)}),
    "mobilenet_v3_small": (2_542_856, {"features.1.block.1.fc2.weight": (16, 8, 1, 1)}),
    "efficientnet_b0": (5_288_548, {"features.2.0.block.2.fc1.bias": (4,), "classifier.1.bias": (1000,)}),
    "efficientnet_b3": (12_233_232, {"features.8.0.weight": (1536, 384, 1, 1)}),
    "convnext_tiny": (28_589_128, {"features.5.8.layer_scale": (384, 1, 1), "features.2.1.weight": (192, 96, 2, 2)}),
    "vit_b_16": (
        86_567_656,
        {
            "encoder.layers.encoder_layer_11.self_attention.in_proj_weight": (2304, 768),
            "encoder.layers.encoder_layer_0.mlp.3.weight": (768, 3072),
            "heads.head.weight": (1000, 768),
        },
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_public_checkpoints_fit(name):
    count, shapes = CHECKPOINTS[name]
    with torch.device("meta"):
        network = build(name, 1000, 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    state = network.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_too_many_halvings_are_refused():
    with pytest.raises(DataError, match="0 to 5, not 6"):
        build("mobilenet_v2", 10, 3, halvings=6)
    with pytest.raises(DataError, match="do not divide into patches"):
        build("vit", 10, 3, image_size=30)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        build("resnet8", 10, 3)
    with pytest.raises(UnknownNameError, match="did you mean 'width'"):
        build("resnet18", 10, 3, widht=16)
    with pytest.raises(UnknownNameError, match="preact"):
        build("small_cnn", 10, 1, shape="preactt")
