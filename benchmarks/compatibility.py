"""Networks of other people's packages: which of them this package finds the neurons of, masks, cuts and repairs.

    python3 -m venv compat && . compat/bin/activate
    pip install torch==2.13.0
    pip install -c constraints.txt -e .
    pip install --no-deps -r benchmarks/compatibility-requirements.txt
    pip install transformers==5.24.0 huggingface_hub pyyaml
    python benchmarks/compatibility.py

timm asks for torchvision; ``benchmarks/stubs`` has the names that it imports, and nothing behind them. Weights are random
and nothing is downloaded. Each network is checked in a process of its own (``compatibility_checks.py``) that gets a
limited time of the processor; a row is added to ``benchmarks/results/compatibility.jsonl`` when it ends, and is not made
again unless ``--redo`` says so or the package has another version. ``--quick`` leaves out CLP, cutting and repairing.
``--table`` only writes ``docs/compatibility.md``, which every run does at its end.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap

from backdoor_gym.benchmarking.resuming import Row, RowFile

HERE = Path(__file__).parent
ROWS, PAGE = (
    RowFile(HERE / "results" / "compatibility.jsonl", ("package", "name", "version")),
    HERE.parent / "docs" / "compatibility.md",
)
PACKAGES = ("timm", "pytorchcv", "transformers")
#: Seconds of the processor for one network: quick, with all checks, and with a full repair.
QUICK, ALL, REPAIR = 180, 600, 1200
#: Every so many networks of a package one is repaired in full.
SAMPLE = 10
WHOLE = 0.9
#: Columns of the page's paragraphs.
WIDTH = 130

Key = tuple[str, str, str]


# ---- running


def key_of(row: Row) -> Key:
    return row["package"], row["name"], row["version"]


def read_rows() -> dict[Key, Row]:
    """The last row of each network."""
    return {key_of(row): row for row in ROWS.rows()}


def sampled(drawn: Sequence[Row]) -> set[tuple[str, str]]:
    """Which networks are repaired in full: every tenth of each package, in the order in which they are drawn."""
    return {
        (network["package"], network["name"])
        for package in PACKAGES
        for network in [network for network in drawn if network["package"] == package][::SAMPLE]
    }


def is_checked(row: Row) -> bool:
    """Whether it is more than the name of a network that was drawn."""
    return "stage" in row


def is_open(row: Row, quick: bool, redo: str | None) -> bool:
    """Whether a network has to be checked (again)."""
    if not is_checked(row) or (redo is not None and re.search(redo, f"{row['package']}/{row['name']}")):
        return True
    return row["quick"] and not quick and "not_built" not in row


def draw(versions: dict[str, str]) -> dict[Key, Row]:
    """The networks of these versions, which are drawn once: a row each, with nothing in it but names."""
    script = [sys.executable, "-W", "ignore", str(HERE / "compatibility_networks.py")]
    drawn = json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    rows = [{**network, "version": versions[network["package"]]} for network in drawn]
    return {key_of(row): row for row in rows}


def run(network: Row, quick: bool, full_repair: bool) -> Row:
    """Check one network in a process of its own."""
    seconds = QUICK if quick else REPAIR if full_repair else ALL
    asked = {**network, "quick": quick, "full_repair": full_repair, "seconds": seconds}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "ignore", str(HERE / "compatibility_checks.py"), json.dumps(asked)]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=6 * seconds)
        printed, errors, code = ended.stdout, ended.stderr, ended.returncode
    except subprocess.TimeoutExpired as expired:
        printed, errors, code = (expired.stdout or b"").decode(), "", None
    rows = [line for line in printed.splitlines() if line.startswith('{"package"')]
    row = {**network, "stage": "start"} | (json.loads(rows[-1]) if rows else {})
    if row["stage"] != "done":
        timed_out = code in (None, -24, -9)  # SIGXCPU, and SIGKILL five seconds later
        last = (errors.strip().splitlines() or [""])[-1]
        row["ended"] = f"time limit of {seconds} s" if timed_out else f"the process ended with {code}: {last[:300]}"
    return {**network, "quick": quick, "code": _commit(), **row}


def _commit() -> str:
    """The state of the package that was checked."""
    import backdoor_gym

    folder = Path(backdoor_gym.__file__).parent
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


# ---- judging


def is_right(row: Row) -> bool:
    """Found, with masks that are right and batch normalisations that are seen."""
    return (
        row.get("found", False)
        and row.get("masks", {}).get("right", False)
        and row.get("batch_norms", {"unseen": 1})["unseen"] == 0
    )


def cut_enough(row: Row) -> bool:
    return row.get("cut", {}).get("equal", False) and row["cut"]["enough"]


def faults(row: Row) -> list[str]:
    """What keeps a network from being whole, one sentence each, in the order of the checks."""
    reasons = []
    for stage in ("from_module", "find", "account", "masks", "clp", "cut", "onp", "repair"):
        told = row.get(stage, {})
        if "refused" in told:
            reasons.append(f"{stage} is refused: {told['refused']}")
        if "untyped" in told:
            reasons.append(f"{stage} fails: {told['untyped']}")
    if "ended" in row:
        reasons.append(f"{row['stage']}: {row['ended']}")
    coverage, masks = row.get("coverage"), row.get("masks", {})
    if coverage is not None and coverage < WHOLE:
        gaps = ", ".join(f"{name} ({reason or 'no reason'})" for name, _, reason in row.get("gaps", [])[:2])
        reasons.append(f"coverage {coverage:.2f}: {gaps}")
    if masks.get("right") is False:
        wrong = [
            f"{name} {masks[name]:.0e}" for name in ("unmasked", "written", "hooked") if masks[name] > masks["allowed"]
        ]
        reasons.append(f"masks are wrong: {', '.join(wrong)}")
    if row.get("batch_norms", {}).get("unseen"):
        norms = row["batch_norms"]
        reasons.append(
            f"{norms['unseen']} of {norms['calls']} batch normalisations not seen, first {norms['first'][0]}"
        )
    if row.get("clp", {}).get("finite") is False:
        reasons.append("CLP leaves a network without finite answers")
    if row.get("cut", {}).get("equal") is False:
        reasons.append(f"the cut network answers differently, by {row['cut']['error']:.0e}")
    return reasons


def is_whole(row: Row) -> bool:
    ran = all(stage in row for stage in ("clp", "cut", "onp"))
    return is_right(row) and row.get("coverage", 0.0) >= WHOLE and ran and not faults(row)


# ---- the page


def _share(part: int, of: int) -> str:
    return f"{part} ({100 * part / of:.1f} %)" if of else "0"


def counts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The figures at the head of the page."""
    checked = [row for row in rows if is_checked(row)]
    built = [row for row in checked if "not_built" not in row]
    full = [row for row in built if not row["quick"]]
    cut = [row for row in full if "smaller" in row.get("cut", {})]
    little = [row for row in cut if not cut_enough(row)]
    sample = [row for row in full if "repair" in row]
    figures = [
        ("drawn", str(len(rows))),
        ("no classifier of images, or not built by their own package", str(len(checked) - len(built))),
        ("checked", str(len(built))),
        ("neurons found", _share(sum(row.get("found", False) for row in built), len(built))),
        ("found, masks right, all batch normalisations seen", _share(sum(map(is_right, built)), len(built))),
        ("with an error that is none of the package's own", str(sum("untyped" in json.dumps(row) for row in built))),
        ("stopped by the time limit", str(sum("ended" in row for row in built))),
    ]
    if full:
        figures += [
            ("whole", _share(sum(map(is_whole, full)), len(full))),
            ("cut: smaller by at least half of the pruned share", _share(len(cut) - len(little), len(full))),
            ("cut: not, and a layer that stops it is named", str(sum(bool(row["cut"]["stops"]) for row in little))),
            ("repaired in full, of the sample", _share(sum("pruned" in row["repair"] for row in sample), len(sample))),
        ]
    return figures


def page(rows: Sequence[Row], versions: dict[str, str]) -> str:
    """The rows as ``docs/compatibility.md``."""
    lines = [
        "# Compatibility",
        "",
        "Networks of other packages, built with random weights and checked by `benchmarks/compatibility.py`, which also writes",
        "this page. They are drawn by a rule, never by what becomes of them: of each module of timm and each family of",
        "pytorchcv the first network by name with at most 30 million parameters and 400 layers (the smallest where there is",
        "none), and of transformers every image classification in its default configuration, up to 150 million parameters.",
        "",
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}.",
        "",
        *(quickly(rows)),
        "| networks | |",
        "|---|---|",
        *(f"| {what} | {count} |" for what, count in counts(rows)),
        "",
        *wrap(
            "*Coverage* is the share of the output channels and hidden features, of all layers with weights but the output, "
            "that are neurons. *Whole* means coverage of at least 0.9, equal answers masked, written and hooked, CLP and two "
            "steps of ONP that run (with a short search for the trigger), and a cut network with equal answers. Equal is to "
            "1e-4 of the largest logit, beyond the rounding of the network itself in float32. *Hooked* is the author's module "
            "with outputs multiplied by the mask, without this package. *Smaller* is the share of parameters that is gone where "
            "30 % of the groups (neurons that share a sum) are pruned and cut; the pruned share is that of the neurons, times "
            "the coverage.",
            WIDTH,
        ),
    ]
    for package in PACKAGES:
        ours = sorted(
            (row for row in rows if row["package"] == package and is_checked(row)), key=lambda row: row["family"]
        )
        built = [row for row in ours if "not_built" not in row]
        lines += ["", f"## {package}", ""]
        incomplete = [row for row in built if faults(row)]
        if incomplete:
            lines += ["| network | neurons | coverage | smaller | what is missing |", "|---|---|---|---|---|"]
            lines += [f"| {' | '.join(_cells(row))} |" for row in incomplete]
            lines.append("")
        good = [_named(row) for row in built if not faults(row)]
        if good:
            lines += [*wrap(f"Without a fault ({len(good)}): {', '.join(good)}.", WIDTH), ""]
        left_out = [f"{_named(row)} ({_escaped(row['not_built'])[:160]})" for row in ours if "not_built" in row]
        if left_out:
            lines += [*wrap(f"Left out ({len(left_out)}): {'; '.join(left_out)}.", WIDTH), ""]
        stopped = [row for row in built if row.get("cut", {}).get("equal") and not row["cut"]["enough"]]
        if stopped:
            lines += ["Cut, but by less than half of the pruned share, and what stops it:", ""]
            lines += [
                f"- {_named(row)}: {_escaped('; '.join(row['cut']['stops'][:2]) or 'not told')}" for row in stopped
            ]
    return "\n".join(lines).rstrip() + "\n"


def quickly(rows: Sequence[Row]) -> list[str]:
    """What is still to be done: of rows that `--quick` made."""
    count = sum(bool(row.get("quick")) for row in rows if is_checked(row) and "not_built" not in row)
    if not count:
        return []
    said = f"Of {count} networks only neurons, coverage, masks and batch normalisations have been checked so far (`--quick`)."
    return [*wrap(f"{said} CLP, cutting and repairs are still to be run on them.", WIDTH), ""]


def _named(row: Row) -> str:
    return f"`{row['name']}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*")


def _cells(row: Row) -> Iterable[str]:
    yield _named(row)
    yield str(row.get("neurons", ""))
    yield f"{row['coverage']:.2f}" if "coverage" in row else ""
    yield f"{100 * row['cut']['smaller']:.0f} %" if "smaller" in row.get("cut", {}) else ""
    yield _escaped("; ".join(faults(row))[:400])


def write(rows: dict[Key, Row], versions: dict[str, str]) -> None:
    """One row a network, in order, and the page of them."""
    ordered = sorted(rows.values(), key=lambda row: (PACKAGES.index(row["package"]), row["family"]))
    ROWS.path.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")
    PAGE.write_text(page(ordered, versions), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="neurons, coverage and masks alone")
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression of package/name")
    parser.add_argument("--redo", metavar="PATTERN", help="check these again")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--table", action="store_true", help="check nothing, write the page")
    parser.add_argument("--list", action="store_true", help="show what is drawn")
    options = parser.parse_args()
    versions = {name: version(name) for name in (*PACKAGES, "torch")}
    rows = {key: row for key, row in read_rows().items() if row["version"] == versions[row["package"]]}
    if {row["package"] for row in rows.values()} != set(PACKAGES):
        rows = draw(versions) | rows
        write(rows, versions)
    if options.list:
        print("\n".join(f"{row['package']} {row['family']} {row['name']}" for row in rows.values()))
        return
    if not options.table:
        repaired = sampled(list(rows.values()))
        asked = [
            {name: row[name] for name in ("package", "family", "name", "version")}
            for row in rows.values()
            if re.search(options.only, f"{row['package']}/{row['name']}") and is_open(row, options.quick, options.redo)
        ]
        # Of all packages in turn; the sample that takes long comes last.
        asked.sort(key=lambda network: ((network["package"], network["name"]) in repaired, network["family"]))
        with ThreadPoolExecutor(options.workers) as pool:

            def check(network: Row) -> Row:
                return run(network, options.quick, (network["package"], network["name"]) in repaired)

            futures = [pool.submit(check, network) for network in asked]
            for place, future in enumerate(as_completed(futures), 1):
                row = future.result()
                rows[key_of(row)] = row
                ROWS.add(**row)
                told = row.get("not_built") or "; ".join(faults(row)) or "right"
                print(f"{place}/{len(asked)} {row['package']}/{row['name']}: {told[:200]}", flush=True)
    write(rows, versions)


if __name__ == "__main__":
    main()
