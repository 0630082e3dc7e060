"""Mutated files: each is read right, or refused by an error that says so, in bounded time and memory.

    pip install hypothesis
    python benchmarks/fuzz.py              # 20,000 mutations, some hours of one core
    python benchmarks/fuzz.py --count 300

Half of the mutations change bytes; the others change fields or tensors and sign the file anew, so that they get behind its
checksum. What is read goes through what ``backdoor-gym inspect`` does, and one pass of images. Processes of their own do it, so
that a crash of native code is seen. ``benchmarks/results/fuzz.json`` has the counts and every failure.
"""

import argparse
import copy
import io
import json
import math
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
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
from backdoor_gym.agents.onp import CHECKPOINT
from backdoor_gym.agents.policy_files import check_weights, optimizer_state, read_policy
from backdoor_gym.analysis.features import standardise
from backdoor_gym.analysis.uclc import uclc
from backdoor_gym.attacks import BadNets
from backdoor_gym.benchmarking.cells import CellFile, Conditions, Result
from backdoor_gym.data.datasets import LabelledImages
from backdoor_gym.data.own_images import own_images
from backdoor_gym.errors import BackdoorGymError
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.models.catalogue import load_infected
from backdoor_gym.models.training import Schedule, train
from backdoor_gym.networks import build
from backdoor_gym.neurons.finding import find_neurons

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
#: Seconds and bytes that one mutation may take.
MOST_SECONDS, MOST_MEMORY = 10, 4 << 30
#: Mutations that one process works through.
BATCH = 250
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
    clean = LabelledImages(*images())
    trigger = BadNets(torch.ones(1, 2, 2), 1, 2)
    InfectedModel(
        build(**SPEC),
        clean,
        clean,
        trigger,
        1,
        dict(SPEC),
        {"attack": "badnets", "acc": 0.9, "more": [1, "a"]},
        "fuzzed",
    ).save(path)


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
    write_tensors(path, tensors, {**onp._description(), "format": CHECKPOINT, "timesteps": 64})


def train_on(path: Path) -> None:
    torch.manual_seed(0)
    train(build(**SPEC), *images(), SCHEDULE, 0, checkpoint=path)


def write_cells(path: Path) -> None:
    for seed in range(3):
        conditions = {"clean_samples": None, "max_steps": 5}
        CellFile(path).append(
            Result(
                "digits-clean", "onp", 0.02, seed, "onp", conditions, "clean", "mlp", 9, 1, 0.9, acc=0.9, seconds=1.5
            )
        )


def write_npz(path: Path) -> None:
    pixels, labels = images()
    np.savez_compressed(path, images=(pixels * 255).byte().numpy(), labels=labels.numpy())


def write_png(path: Path) -> None:
    Image.fromarray((images()[0][0, 0] * 255).byte().numpy()).save(path)


def write_gif(path: Path) -> None:
    Image.fromarray((images()[0][0, 0] * 255).byte().numpy()).save(path, "GIF")


def write_tiff(path: Path) -> None:
    Image.fromarray((images()[0][0, 0] * 255).byte().numpy()).save(path, "TIFF")


def write_torch(path: Path) -> None:
    torch.manual_seed(0)
    torch.save({"model": build(**SPEC).state_dict(), "epoch": 3}, path)


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
    file = CellFile(path)
    file.drop_unfinished()
    return file.read(Conditions())


def read_images(path: Path) -> Any:
    return own_images(str(path))


def read_folder(path: Path) -> Any:
    return own_images(str(path.parent.parent))


def read_torch(path: Path) -> Any:
    return load_infected(path, architecture="small_cnn", options={"width": 4, "blocks": 1}, clean=images())


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
    header = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": draw.choice(((10**6, 1000, 1000), (-1,), (2**62, 4), ())),
    }
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
    odd: Callable[[], Any] = draw.choice(
        (
            lambda: weights[name],
            lambda: torch.zeros(1).expand(10**6, 10**6),
            lambda: torch.zeros(2, 3).to("meta"),
            lambda: torch.zeros(2, 3).to_sparse(),
            lambda: copy.deepcopy(draw.choice(STRANGE)),
        )
    )
    weights[name] = odd()
    torch.save(draw.choice(({"model": weights}, weights, [weights], {"a": {"b": weights}})), path)


Writer, Reader, Mutation = Callable[[Path], None], Callable[[Path], Any], Callable[[Path, random.Random], None]
#: By kind: where the file lies, what writes it, reads it, and mutates what it says.
KINDS: dict[str, tuple[str, Writer, Reader, Mutation]] = {
    "model": ("m.safetensors", write_model, read_model, mutate_signed),
    "policy": ("p.safetensors", write_policy, read_policy_file, mutate_signed),
    "policy checkpoint": ("p.checkpoint", write_policy_checkpoint, read_policy_checkpoint, mutate_signed),
    "training checkpoint": ("t.checkpoint", train_on, train_on, mutate_signed),
    "cells": ("cells.jsonl", write_cells, read_cells, mutate_cells),
    "npz": ("i.npz", write_npz, read_images, mutate_npz),
    "png": ("folder/0/i.png", write_png, read_folder, mutate_png),
    "gif": ("folder/0/i.gif", write_gif, read_folder, mutate_bytes),
    "tiff": ("folder/0/i.tiff", write_tiff, read_folder, mutate_bytes),
    "torch": ("m.pt", write_torch, read_torch, mutate_torch),
}
#: Those whose checksum must tell every change of a byte.
PROTECTED = ("model", "policy", "policy checkpoint", "training checkpoint")


class TooLateError(BaseException):
    """A file took longer than ``MOST_SECONDS``; readers that catch every ``Exception`` do not take it for damage."""


class Originals:
    """One file of each kind, written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[str, bytes] = {}
        for kind, (name, write, _, _) in KINDS.items():
            path = folder / "originals" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            self.contents[kind] = path.read_bytes()

    def mutated(self, kind: str, draw: random.Random) -> tuple[Path, bool]:
        """A mutated one, and whether what it says was changed rather than its bytes."""
        path = self.folder / kind / KINDS[kind][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.contents[kind])
        signed = draw.random() < 0.6
        (KINDS[kind][3] if signed else mutate_bytes)(path, draw)
        return path, signed


def check(originals: Originals, kind: str, draw: random.Random) -> str:
    """Mutate and read one file; "read", "refused", or "same" where nothing was changed.

    Raises:
        AssertionError: it was damaged, and read without a word.
        Exception: whatever else reading it raised.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, signed = originals.mutated(kind, draw)
        content = path.read_bytes()
        if content == originals.contents[kind]:
            return "same"
        message = None
        try:
            KINDS[kind][2](path)
        except BackdoorGymError as error:
            message = str(error)
        if message is not None:
            assert message.isprintable(), f"an error of several lines, or with control characters: {message!r}"
            assert message, "an error without a message"
            return "refused"
        if kind in PROTECTED and not signed:
            path.write_bytes(content)  # a training goes on and writes it anew
            before = originals.folder / "before.safetensors"
            before.write_bytes(originals.contents[kind])
            (tensors, metadata), (ours, known) = read_tensors(path), read_tensors(before)
            assert (metadata, tensors.keys()) == (known, ours.keys()), "damage that nobody noticed"
            assert all(torch.equal(tensors[key], ours[key]) for key in ours), "damage that nobody noticed"
    return "read"


# ---- running many


def work(first: int, count: int) -> None:
    """Mutations of these seeds in this process; prints a JSON line before and after each."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY + (6 << 30), MOST_MEMORY + (6 << 30)))
    torch.set_num_threads(1)

    def late(*_: object) -> None:
        raise TooLateError(f"more than {MOST_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as folder:
        originals = Originals(Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(first, first + count):
            draw = random.Random(seed)
            kind = draw.choice(sorted(KINDS))
            print(json.dumps({"seed": seed, "kind": kind}), flush=True)
            start, outcome, why = time.perf_counter(), "", ""
            signal.alarm(MOST_SECONDS)
            try:
                outcome = check(originals, kind, draw)
            except (Exception, TooLateError) as error:
                outcome = "failed"
                frames = traceback.extract_tb(error.__traceback__)[-4:]
                where = " / ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
                why = f"{type(error).__name__}: {str(error)[:300]} in {where}"
            signal.alarm(0)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if (after - before) << 10 > MOST_MEMORY:
                outcome, why = "failed", f"{(after - before) >> 10} MiB of memory"
            row = {"seed": seed, "kind": kind, "outcome": outcome, "seconds": round(time.perf_counter() - start, 3)}
            print(json.dumps(row | ({"why": why} if why else {})), flush=True)


def run_batch(first: int, count: int) -> list[dict[str, Any]]:
    """The rows of one process; a seed that it did not come back from has failed, and the next process goes on behind it."""
    rows: list[dict[str, Any]] = []
    seed, end = first, first + count
    while seed < end:
        command = [sys.executable, __file__, "--work", str(seed), str(end - seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        rows += [line for line in lines if "outcome" in line]
        if lines and "outcome" in lines[-1] and lines[-1]["seed"] == end - 1:
            break
        if not lines:
            raise RuntimeError(f"nothing was mutated: {done.stderr[-500:]}")
        last = lines[-1]
        if "outcome" not in last:
            rows.append({**last, "outcome": "failed", "seconds": 0, "why": f"the process ended with {done.returncode}"})
        seed = last["seed"] + 1
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    firsts = range(options.seed, options.seed + options.count, BATCH)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        counts = [min(BATCH, options.seed + options.count - first) for first in firsts]
        for done in pool.map(run_batch, firsts, counts):
            rows += done
            bad = [row for row in done if row["outcome"] == "failed"]
            print(f"{len(rows)}/{options.count}", *(json.dumps(row) for row in bad), sep="\n", flush=True)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for row in rows:
        outcomes[row["kind"]][row["outcome"]] += 1
    record = {
        "mutations": len(rows),
        "failed": [row for row in rows if row["outcome"] == "failed"],
        "by_kind": {kind: dict(sorted(counter.items())) for kind, counter in outcomes.items()},
        "slowest_seconds": max(row["seconds"] for row in rows),
        "versions": {name: version(name) for name in ("torch", "safetensors", "numpy", "pillow", "msgspec")},
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["by_kind"], indent=1), f"{len(record['failed'])} failed", sep="\n")


if __name__ == "__main__":
    main()
