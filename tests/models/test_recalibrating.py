import copy

import torch
from torch import nn

from backdoor_gym.data.datasets import load_images
from backdoor_gym.models.infecting import infect
from backdoor_gym.models.recalibrating import recalibrate
from backdoor_gym.models.training import Schedule


def test_statistics_become_those_of_the_images(monkeypatch):
    monkeypatch.setattr("backdoor_gym.models.recalibrating.BATCH_SIZE", 20)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Flatten(), nn.Linear(48, 2))
    weights = copy.deepcopy(dict(network.named_parameters()))
    images = torch.rand(40, 1, 6, 6) + 2
    recalibrate(network, images)
    norm, inputs = network[1], network[0](images)
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, inputs.var((0, 2, 3)), atol=0, rtol=0.1)
    assert norm.momentum == 0.1
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, weights[key]) for key, value in network.named_parameters())


def test_an_attacker_who_knows_the_bn_features_leaves_clean_statistics():
    def make(recalibrated):
        return infect(
            "digits",
            "small_cnn",
            "blended",
            schedule=Schedule(epochs=5, batch_size=64, learning_rate=0.05, augment=False),
            architecture_options={"width": 16, "blocks": 2},
            clean_images=100,
            recalibrated=recalibrated,
        )

    plain, adapted = make(False), make(True)
    images, _ = load_images("digits", "all")
    others = set(range(len(images))) - {*plain.clean.source.indices, *plain.test.source.indices}
    assert not torch.equal(plain.network.stem[1].running_mean, adapted.network.stem[1].running_mean)
    recalibrate(plain.network, images[sorted(others)])
    for key, value in plain.network.state_dict().items():
        assert torch.equal(value, adapted.network.state_dict()[key]), key
    assert adapted.facts["asr"] > 0.9
    assert adapted.facts["recalibrated"] is True
    assert "recalibrated" not in plain.facts
