"""The rooms of the package stand in an order, and a module imports only from those above its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Modules and packages, from the first to the last.
ORDER = (
    "wording", "errors", "outcomes", "arguments", "writing", "progress", "devices", "files", "data", "networks", "attacks",
    "metrics", "on_ray.cluster", "processes", "models", "neurons", "masking", "analysis", "session", "rendering", "envs",
    "policies", "reporting", "rounds", "detecting", "repairing", "benchmarking", "baselines", "agents", "on_ray.rllib", "cli",
)  # fmt: skip
#: ``__init__`` of the package names its public functions, and resolves them when they are asked for.
FREE = ("", "embedded")
#: Imports from below that are resolved when they are asked for: the registry of policies.
REGISTRY = {("policies", "baselines"), ("policies", "agents")}


def files():
    for folder in ("backdoor_gym", "agents", "baselines"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "backdoor_gym" else parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> str | None:
    """The entry of the order that a module belongs to."""
    return next((entry for entry in ORDER if module == entry or module.startswith(entry + ".")), None)


def imported(path: Path, module: str) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parts = package.split(".") if package else []
            base = parts[: len(parts) - node.level + 1]
        elif node.module and node.module.split(".")[0] == "backdoor_gym":
            base = []
        else:
            continue
        tail = (node.module or "").removeprefix("backdoor_gym").lstrip(".") if not node.level else node.module or ""
        target = ".".join([*base, *([tail] if tail else [])])
        names |= {target} if target else {alias.name for alias in node.names}
    return names


def test_every_module_has_a_place():
    modules = {module_of(path) for path in files()}
    assert {module for module in modules if room_of(module) is None} <= {*FREE, "on_ray"}
    assert all(any(room_of(module) == entry for module in modules) for entry in ORDER)


@pytest.mark.parametrize("path", list(files()), ids=module_of)
def test_a_module_imports_from_above_alone(path):
    module = module_of(path)
    room = room_of(module)
    if room is None:
        return
    for target in imported(path, module):
        other = room_of(target)
        if other is None or other == room or (room, other) in REGISTRY:
            continue
        assert ORDER.index(other) < ORDER.index(room), f"{module} imports {target}, which comes later"
