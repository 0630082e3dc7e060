from dataclasses import replace
from time import process_time

import numpy as np
import pytest
from matplotlib import pyplot

from backdoor_gym.rendering.drawing import CELL, HEIGHT, WIDTH, Snapshot, arrange, frame, text

SIZES = {"wide": [16] * 5 + [32] * 5 + [64] * 5 + [128] * 5, "deep": [4] * 150, "narrow": [3]}


def snapshot(sizes, name="model", pruned=(), **changes):
    count = sum(sizes)
    gone = np.isin(np.arange(count), pruned)
    nothing = np.zeros(count, dtype=bool)
    drawn = Snapshot(
        name=name,
        layers=tuple((f"layer{index}.conv", size) for index, size in enumerate(sizes)),
        suspicion=np.linspace(-1, 6, count),
        strengths=np.linspace(0, 1, count),
        pruned=gone,
        undone=nothing,
        latest=nothing,
        acc=(0.9,) * (1 + len(pruned)),
        danger=(0.8,) * (1 + len(pruned)),
        asr=(),
    )
    return replace(drawn, **changes)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_neurons_of_any_network_fit_and_do_not_overlap(sizes):
    places = arrange(sizes, 400, 500)
    assert 0 < places.cell <= CELL
    assert places.x.min() > 0
    assert places.x.max() < 400
    assert places.y.min() > 0
    assert places.y.max() < 500
    x, y = places.x[:, None] - places.x, places.y[:, None] - places.y
    apart = np.hypot(x, y) + np.eye(len(places.x)) * 1e6
    assert apart.min() > places.cell * 0.999
    assert (np.diff(places.rows) > places.cell).all()


@pytest.mark.slow
def test_every_property_of_a_snapshot_is_to_be_seen():
    plain = snapshot(SIZES["wide"])
    one = np.arange(sum(SIZES["wide"])) == 200
    seen = [plain] + [
        replace(plain, **change)
        for change in (
            {"name": "other"},
            {"suspicion": plain.suspicion[::-1]},
            {"strengths": plain.strengths[::-1]},
            {"pruned": one},
            {"undone": one},
            {"latest": one},
            {"acc": (0.4,)},
            {"danger": (0.4,)},
            {"asr": (0.4,)},
            {"least_acc": 0.5},
            {"acc": (0.9,) * 3, "danger": (0.8,) * 3},
            {"acc": (0.9,) * 3, "danger": (0.8,) * 3, "given_back": 1},
        )
    ]
    frames = [frame(one) for one in seen]
    assert {picture.shape for picture in frames} == {(HEIGHT, WIDTH, 3)}
    assert len({picture.tobytes() for picture in frames}) == len(frames)
    assert np.array_equal(frame(plain), frames[0])


def test_names_are_drawn_as_they_are():
    """What looks like a formula is none, and must not fail as one."""
    layers = (("$\\frac{", 3), ("<b>" * 50, 2))
    drawn = frame(snapshot([3, 2], name="$\\undefined{\n", layers=layers))
    assert drawn.shape == (HEIGHT, WIDTH, 3)


def test_a_network_without_a_suspected_danger_is_drawn():
    drawn = snapshot([3], danger=())
    assert frame(drawn).shape == (HEIGHT, WIDTH, 3)
    assert text(drawn).splitlines()[1] == "ACC 0.900"


@pytest.mark.slow
def test_frames_are_quick_and_leave_no_figure_behind():
    frame(snapshot([3]))
    drawn = snapshot([sum(SIZES["wide"]) // 20] * 20, pruned=range(40))
    times = []
    for _ in range(5):
        start = process_time()
        frame(drawn)
        times.append(process_time() - start)
    assert min(times) < 0.5  # 0.11 s on a core that nothing else uses
    assert not pyplot.get_fignums()
