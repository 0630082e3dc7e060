"""Names say what values are: none is called ``one``, ``some``, ``found`` or ``wanted``."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("backdoor_gym", "agents", "baselines", "benchmarks")
EMPTY = {"one", "some", "found", "wanted"}


def empty_names(code):
    """Line and name of all that the code gives one of those names to."""
    named = []
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                pass
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                pass
            case ast.ClassDef(name=name) | ast.alias(asname=name) | ast.ExceptHandler(name=name):
                pass
            case ast.MatchAs(name=name) | ast.MatchStar(name=name) | ast.MatchMapping(rest=name):
                pass
            case _:
                continue
        if name is not None and name.strip("_").lower() in EMPTY:
            named.append((getattr(node, "lineno", 0), name))
    return sorted(named)


def test_no_value_has_an_empty_name():
    empty = {}
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            if names := empty_names(file.read_text(encoding="utf-8")):
                empty[file.relative_to(ROOT).as_posix()] = names
    assert not empty


def test_every_kind_of_name_is_seen():
    code = (
        "import os as some\nwanted = 1\nfor one in (): pass\nwith a as found: pass\nself.found = 2\ndef _one(some=3): pass\n"
        "class Found: pass\n[one for one in x]\nlambda wanted: 0\nmatch x:\n    case [one, *some]: pass\nwanted: int = 4\n"
    )
    assert [line for line, _ in empty_names(code)] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 11, 11, 12]
    assert empty_names("known = one(found.wanted, some=1)") == []
