"""Pictures inside the page: images of the data as PNG data URIs, drawings as SVG whose neurons tell their names."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

import numpy as np
import torch
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..analysis.trigger_inversion import InvertedTrigger
from ..rendering.drawing import SIZES, Snapshot, blank, draw_course, draw_key, draw_network, frame, place, size_levels
from ..wording import printable
from ..writing import replacing

#: Images that a picture of a trigger shows.
SHOWN = 8
#: Images of the data are shown at most as large as this, in pixels.
LARGEST = 96
#: Width of drawings, and the least and greatest height of that of the network.
WIDTH, LOW, HIGH = 660, 120, 1400
#: With more neurons than this the network is a picture of points: as a drawing it would be many megabytes.
MOST_NEURONS = 6000
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


def image_uri(image: Tensor) -> Markup:
    """A data URI of one image, float32 (C, H, W) in [0, 1]; neither 1 nor 3 channels are shown as their mean."""
    if max(image.shape[1:]) > LARGEST:
        scale = LARGEST / max(image.shape[1:])
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size=size, mode="area")[0]
    return _png_uri(_picture(image))


def _picture(image: Tensor) -> Image.Image:
    """Of one image, float32 (C, H, W) in [0, 1]; neither 1 nor 3 channels are shown as their mean."""
    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels[0], "L") if len(pixels) == 1 else Image.fromarray(pixels.transpose(1, 2, 0), "RGB")


def difference(image: Tensor, changed: Tensor) -> Tensor:
    """What was added to an image, float32 (C, H, W) in [0, 1]: grey where nothing was, the largest change at full contrast."""
    change = changed - image
    return 0.5 + 0.5 * change / change.abs().max().clamp(min=1e-6)


def write_trigger(trigger: InvertedTrigger, file: Path) -> Path:
    """Write a picture (PNG) of the first images without and with a trigger, and what it added, a column each.

    Raises:
        WriteError: the file cannot be written.
    """
    clean = trigger.clean[:SHOWN].cpu()
    triggered = trigger.images[: len(clean)].cpu()
    rows = [
        torch.cat([clean[index], triggered[index], difference(clean[index], triggered[index])], 1)
        for index in range(len(clean))
    ]
    picture = _picture(torch.cat(rows, 2))
    scale = max(1, -(-LARGEST // clean.shape[3]))
    larger = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with replacing(file) as place:
        larger.save(place, "PNG")
    return file


def course(snapshot: Snapshot) -> Markup:
    """Accuracy and, where there is one, suspected danger after each prune."""
    figure = blank(WIDTH, 276)
    draw_course(place(figure, 40, 44, WIDTH - 62, 190), snapshot)
    return _svg(figure, "What each prune did")


def key() -> Markup:
    """What the marks of ``network`` mean."""
    figure = blank(300, 166)
    draw_key(place(figure, 10, 2, 276, 160))
    return _svg(figure, "Key of the drawing")


def network(snapshot: Snapshot, titles: Sequence[str]) -> Markup:
    """The neurons; each shows its title where the pointer rests on it."""
    if len(titles) > MOST_NEURONS:
        uri = _png_uri(Image.fromarray(frame(snapshot)))
        return Markup('<img src="{}" alt="The network">').format(uri)
    sizes = [size for _, size in snapshot.layers]
    room = min(HIGH, max(420.0, 0.45 * len(titles), 17.0 * len(sizes)))
    for _ in range(2):  # as high as it is needed
        figure = blank(WIDTH, room + 8)
        places = draw_network(place(figure, 6, 4, WIDTH - 12, room), snapshot)
        room = max(LOW, float(places.y.max()) + places.cell)
    levels = size_levels(snapshot.strengths)
    by_size = {
        f"neurons-{level}": [printable(titles[index]) for index in np.flatnonzero(levels == level).tolist()]
        for level in range(1, SIZES + 1)
    }
    return _svg(figure, "The neurons of the network, layer by layer", by_size)


def _svg(figure: Figure, label: str, titles: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Markup:
    """A figure as an element of the page, with titles by the gid of a collection and in its order.

    Names in it are escaped by both libraries that write it.
    """
    written = BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "backdoor-gym"}):  # text as text; the same ids each time
        figure.savefig(written, format="svg", metadata={"Date": None}, transparent=False)
    root = ElementTree.fromstring(written.getvalue())
    for group in root.iter(f"{{{SVG}}}g"):
        texts = titles.get(group.attrib.pop("id", ""))  # the other ids are the same in every figure
        if texts is not None:
            group.attrib["pointer-events"] = "all"
            dots = list(group.iter(f"{{{SVG}}}use")) or list(group.iter(f"{{{SVG}}}path"))
            for dot, text in zip(dots, texts, strict=True):
                ElementTree.SubElement(dot, f"{{{SVG}}}title").text = text
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for size in ("width", "height"):
        del root.attrib[size]  # it is as wide as the page lets it
    root.attrib.update({"role": "img", "aria-label": label, "pointer-events": "none"})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _png_uri(picture: Image.Image) -> Markup:
    written = BytesIO()
    picture.save(written, "PNG", optimize=True)
    return Markup(f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}")
