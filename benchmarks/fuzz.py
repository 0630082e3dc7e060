"""Mutated files: each is read right, or refused by an error that says so, in bounded time and memory.

    python benchmarks/fuzz.py              # 20,000 mutations, some hours of one core
    python benchmarks/fuzz.py --count 300 --out fuzz.json

Half of the mutations change bytes; the others change fields or tensors and sign the file anew, so that they get behind its
checksum. What is read goes through what ``backdoor-gym inspect`` does, and one pass of images. Processes of their own do it, so
that a crash of native code is seen. ``benchmarks/results/fuzz.json`` has the counts and every failure.
"""

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fuzz_files import KINDS, PROTECTED, mutate_bytes

from backdoor_gym.errors import BackdoorGymError
from backdoor_gym.files.tensors import read_tensors

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
#: Seconds and bytes that one mutation may take.
MOST_SECONDS, MOST_MEMORY = 10, 4 << 30
#: Mutations that one process works through.
BATCH = 250


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
