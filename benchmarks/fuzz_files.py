"""What ``fuzz.py`` mutates: files of eleven kinds, how each is written, read, and mutated so that it gets behind its checksum."""

import copy
import io
import json
import math
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backdoor_gym import InfectedModel
from backdoor_gym.agents import ONP
from backdoor_gym.agents.encoder import EncoderOptions
from backdoor_gym.agents.look_ahead import LookAhead
from backdoor_gym.agents.policy_files import CHECKPOINT, check_weights, optimizer_state, read_policy
from backdoor_gym.analysis.features import standardise
from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.attacks import BadNets
from backdoor_gym.benchmarking.cells import CellFile, Conditions, Result
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.data.own_images import own_images
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.models.catalogue import load_infected
from backdoor_gym.models.layout import WEIGHTS
from backdoor_gym.models.training import Schedule, train
from backdoor_gym.networks import build
from backdoor_gym.neurons.finding import find_neurons

SPEC = {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "width": 4, "blocks": 1}
SCHEDULE = Schedule(epochs=2, batch_size=8, augment=False)
#: What a field is replaced by.
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, -0.5, 1e308, 0.1, "", ".", "..", "/", "a" * 20_000, "a\x1b[31m\nb", "a\0b",
    "pandas", "owner/name?size=9999999", "digits", "../../x", "[/nope]", "=1+1", [], {}, [[]], [1, 2, 3], ["a"], {"a": 1},
    [0] * 5000, math.nan, math.inf,
)  # fmt: skip


# ---- what there is to mutate


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 3


def write_model(path: Path) -> None:
    torch.manual_seed(0)
    clean, trigger = LabelledImages(*images()), BadNets(torch.ones(1, 2, 2), 1, 2)
    facts = {"attack": "badnets", "acc": 0.9, "more": [1, "a"]}
    InfectedModel(build(**SPEC), clean, clean, trigger, 1, dict(SPEC), facts, "fuzzed").save(path)


def write_policy(path: Path) -> None:
    onp = ONP(encoder=EncoderOptions(8, 1, 2), look_ahead=LookAhead(), seed=0)
    onp.facts = {"timesteps": 10, "models": 2, "chosen_on": ["digits-val/0"]}
    onp.save(path)


def write_policy_checkpoint(path: Path) -> None:
    onp = ONP(encoder=EncoderOptions(8, 1, 2), seed=0)
    tensors = {f"network.{key}": value for key, value in onp.network.state_dict().items()}
    for index, parameter in enumerate(onp.network.parameters()):
        zeros = torch.zeros_like(parameter)
        moments = {"step": torch.tensor(3.0), "exp_avg": zeros, "exp_avg_sq": zeros}
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    write_tensors(path, tensors, {**onp.description(), "format": CHECKPOINT, "timesteps": 64})


def train_on(path: Path) -> None:
    torch.manual_seed(0)
    train(build(**SPEC), *images(), SCHEDULE, 0, checkpoint=path)


def write_cells(path: Path) -> None:
    figures = {
        "attack": "clean",
        "architecture": "mlp",
        "neurons": 9,
        "pruned": 1,
        "acc_before": 0.9,
        "acc": 0.9,
        "seconds": 1.5,
    }
    for seed in range(3):
        conditions = {"clean_samples": None, "max_steps": 5}
        CellFile(path).add(Result("digits-clean", "onp", 0.02, seed, "onp", conditions, **figures))


def write_npz(path: Path) -> None:
    pixels, labels = images()
    np.savez_compressed(path, images=(pixels * 255).byte().numpy(), labels=labels.numpy())


def write_picture(path: Path) -> None:
    Image.fromarray((images()[0][0, 0] * 255).byte().numpy()).save(path)


def write_torch(path: Path) -> None:
    torch.manual_seed(0)
    torch.save({"model": build(**SPEC).state_dict(), "epoch": 3}, path)


def write_config(path: Path) -> None:
    """A folder of transformers."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, id2label=dict(enumerate("abc")))
    transformers.ViTForImageClassification(config).save_pretrained(path.parent)


# ---- reading them


def read_model(path: Path) -> Any:
    model = load_infected(path)
    neurons = find_neurons(model.network, model.clean.first(2).images)
    for bounds in uclc(neurons.graph, neurons):
        standardise(bounds)
    with torch.no_grad():
        assert torch.isfinite(model.network(model.clean.images[:4])).all(), "logits that are not finite"
    json.dumps({"name": model.name, **model.facts}, allow_nan=False)
    return model


def read_policy_file(path: Path) -> Any:
    onp = ONP.load(path)
    assert all(bool(torch.isfinite(value).all()) for value in onp.network.state_dict().values()), "weights not finite"
    json.dumps(onp.facts, allow_nan=False)
    return onp


def read_policy_checkpoint(path: Path) -> Any:
    tensors, metadata = read_tensors(path)
    policy = read_policy(metadata, CHECKPOINT, path)
    network = {key.removeprefix("network."): value for key, value in tensors.items() if key.startswith("network.")}
    check_weights(policy.encoder, network, path)
    return optimizer_state(tensors, list(ONP(encoder=policy.encoder).network.parameters()), path)


def read_cells(path: Path) -> Any:
    return CellFile(path).read(Conditions())


def read_npz(path: Path) -> Any:
    return own_images(str(path))


def read_picture(path: Path) -> Any:
    return own_images(str(path.parent.parent))


def read_torch(path: Path) -> Any:
    return load_infected(path, architecture="small_cnn", options={"width": 4, "blocks": 1}, clean=images())


def read_config(path: Path) -> Any:
    if not (path.parent / WEIGHTS).exists():
        (path.parent / WEIGHTS).symlink_to(path.parents[2] / "originals" / path.parent.name / WEIGHTS)
    pixels, labels = images()
    return load_infected(path.parent, clean=(pixels.expand(-1, 3, -1, -1), labels), preprocess=torch.nn.Identity())


# ---- mutating


def mutate_bytes(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        place = draw.randrange(len(content)) if content else 0
        length = draw.choice((1, 2, 8, 64))
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[place : place + length] = bytes(draw.randrange(256) for _ in range(length))
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = content[place : place + length]
        elif kind == 4:
            del content[place:]
        else:
            content[place : place + length] = bytes([draw.choice((0, 255))]) * length
    path.write_bytes(bytes(content))


def mutate_value(value: Any, draw: random.Random) -> Any:
    """The same with one field, somewhere in it, replaced, left out, or added."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        kind = draw.randrange(8)
        if kind == 0:
            return {name: content for name, content in value.items() if name != key}
        if kind == 1:
            return {**value, draw.choice(("x", "", "name", "a\x1b", "k" * 300)): copy.deepcopy(draw.choice(STRANGE))}
        return {**value, key: mutate_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], mutate_value(value[place], draw), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, -value, value * 1000, value * 10**9))
    return copy.deepcopy(draw.choice(STRANGE))


def mutate_tensors(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    kind = draw.randrange(6)
    if kind == 0:
        return {key: tensor for key, tensor in tensors.items() if key != name}
    if kind == 1:
        return {**tensors, draw.choice(("x", f"{name}x", "network.x\x1b", "")): value}
    if kind == 2:
        kinds = (torch.int8, torch.int64, torch.float16, torch.float64, torch.bool, torch.complex64, torch.bfloat16)
        return {**tensors, name: value.to(draw.choice(kinds))}
    if kind == 3:
        shapes = (value.flatten(), value[None], value.flatten()[:0], value.flatten()[:1])
        return {**tensors, name: draw.choice(shapes)}
    if kind == 4:
        return {**tensors, name: tensors[draw.choice(sorted(tensors))]}
    numbers = (0, -1, 1e4, 3e38, math.nan, math.inf) if value.is_floating_point() else (0, -1, 2**40 - 1)
    changed = value.clone()
    if value.numel():
        part = slice(None) if draw.random() < 0.5 else slice(0, 1)
        number = draw.choice(numbers)
        limit = torch.finfo(value.dtype).max if value.is_floating_point() else torch.iinfo(value.dtype).max
        changed.view(-1)[part] = number if not number > limit else limit
    return {**tensors, name: changed}


def mutate_signed(path: Path, draw: random.Random) -> None:
    """Change what the file says or holds, and write it as the package would."""
    tensors, metadata = read_tensors(path)
    if draw.random() < 0.6:
        metadata = mutate_value(metadata, draw)
    else:
        tensors = mutate_tensors(tensors, draw)
    write_tensors(path, tensors, metadata if isinstance(metadata, dict) else {"format": metadata})


def mutate_cells(path: Path, draw: random.Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    place = draw.randrange(len(lines))
    lines[place] = json.dumps(mutate_value(json.loads(lines[place]), draw))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mutate_config(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(mutate_value(json.loads(path.read_text(encoding="utf-8")), draw)), encoding="utf-8")


def mutate_npz(path: Path, draw: random.Random) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    name = draw.choice(sorted(arrays))
    kind = draw.randrange(5)
    if kind == 0:
        kinds = ("int8", "float16", "float64", "bool", "complex64", "U3", "datetime64[s]", "uint64")
        arrays[name] = arrays[name].astype(draw.choice(kinds))
    elif kind == 1:
        shapes = (arrays[name].ravel(), arrays[name][None], arrays[name].ravel()[:0], arrays[name][:1], arrays[name].T)
        arrays[name] = draw.choice(shapes)
    elif kind == 2:
        arrays[draw.choice(("x", "../x", "images/"))] = arrays.pop(name)
    elif kind == 3:
        arrays[name] = np.full(arrays[name].shape, draw.choice((math.nan, math.inf, -1.0, 1e30, 2.5)))
    if kind < 4:
        np.savez(path, **arrays)
        return
    shape = draw.choice(((10**6, 1000, 1000), (-1,), (2**62, 4), ()))
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    text = repr(header).encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    member = io.BytesIO(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(1000))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", member.getvalue())


def mutate_png(path: Path, draw: random.Random) -> None:
    """Change a chunk and its check sum."""
    content, place, chunks = path.read_bytes(), 8, []
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], bytearray(content[place + 8 : place + 8 + length])))
        place += 12 + length
    index = draw.randrange(len(chunks))
    data = chunks[index][1]
    if data and draw.random() < 0.7:
        data[draw.randrange(len(data))] = draw.randrange(256)
    else:
        extra = draw.choice(((b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7))), (b"IHDR", bytes(data)), (b"abCd", b"")))
        chunks.insert(index, (extra[0], bytearray(extra[1])))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(content[:8] + b"".join(parts))


def mutate_torch(path: Path, draw: random.Random) -> None:
    content = torch.load(path, weights_only=True)
    weights = mutate_tensors(dict(content["model"]), draw)
    name = draw.choice(sorted(weights))
    odd: tuple[Callable[[], Any], ...] = (
        lambda: weights[name],
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: torch.zeros(2, 3).to("meta"),
        lambda: torch.zeros(2, 3).to_sparse(),
        lambda: copy.deepcopy(draw.choice(STRANGE)),
    )
    weights[name] = draw.choice(odd)()
    torch.save(draw.choice(({"model": weights}, weights, [weights], {"a": {"b": weights}})), path)


Writer, Reader, Mutation = Callable[[Path], None], Callable[[Path], Any], Callable[[Path, random.Random], None]
#: By kind: where the file lies, what writes it, reads it, and mutates what it says.
KINDS: dict[str, tuple[str, Writer, Reader, Mutation]] = {
    "model": ("m.safetensors", write_model, read_model, mutate_signed),
    "policy": ("p.safetensors", write_policy, read_policy_file, mutate_signed),
    "policy checkpoint": ("p.checkpoint", write_policy_checkpoint, read_policy_checkpoint, mutate_signed),
    "training checkpoint": ("t.checkpoint", train_on, train_on, mutate_signed),
    "cells": ("cells.jsonl", write_cells, read_cells, mutate_cells),
    "npz": ("i.npz", write_npz, read_npz, mutate_npz),
    "png": ("folder/0/i.png", write_picture, read_picture, mutate_png),
    "gif": ("folder/0/i.gif", write_picture, read_picture, mutate_bytes),
    "tiff": ("folder/0/i.tiff", write_picture, read_picture, mutate_bytes),
    "transformers": ("vit/config.json", write_config, read_config, mutate_config),
    "torch": ("m.pt", write_torch, read_torch, mutate_torch),
}
#: Those whose checksum must tell every change of a byte.
PROTECTED = ("model", "policy", "policy checkpoint", "training checkpoint")
