"""What is written stands where it is said to stand."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

from backdoor_gym import baselines
from backdoor_gym.attacks import ATTACKS
from backdoor_gym.cli import app
from backdoor_gym.envs.layers import BackdoorPruneLayersEnv
from backdoor_gym.envs.prune import BackdoorPruneEnv

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tutorials/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page):
    links = re.findall(r"\]\(([^)\s:#]+)(?:#[^)\s]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("environment", [BackdoorPruneEnv, BackdoorPruneLayersEnv])
def test_the_class_docstring_is_the_whole_specification(environment):
    text = inspect.getdoc(environment)
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    for words in ("Description", "Action", "Observation", "Reward", "Starting state", "Episode end", "Arguments"):
        assert [heading for heading in headings if heading.startswith(words)], words
    assert headings[-1] == "Version history"
    described = re.findall(r"^    \*{0,2}(\w+): ", text.partition("Args:\n")[2].partition("## ")[0], re.MULTILINE)
    wanted = list(inspect.signature(environment).parameters)
    assert described[: len(wanted)] == wanted


def test_arrays_have_the_sizes_that_the_docstring_gives():
    single = BackdoorPruneEnv()
    for key, (columns,) in {
        "nodes": single.observation_space["nodes"].shape[1:],
        "edges": single.observation_space["edges"].shape[1:],
        "globals": single.observation_space["globals"].shape,
    }.items():
        row = next(line for line in inspect.getdoc(BackdoorPruneEnv).splitlines() if line.startswith(f"| ``{key}``"))
        assert re.search(rf"\((?:[NE], )?{columns},?\)", row), row


def test_every_attack_and_rule_is_described():
    described = set(
        re.findall(r"^::: (backdoor_gym\.[\w.]+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
    )
    attacks = {f"{attack.__module__}.{attack.__name__}" for attack in ATTACKS.values()}
    rules = {
        f"backdoor_gym.baselines.{module}"
        for module in baselines.__all__
        if inspect.ismodule(getattr(baselines, module))
    }
    assert attacks | rules <= described


def test_messages_are_quoted_as_they_are():
    """The page of one's own networks lists messages; each begins as one in the code does."""
    code = " ".join(page.read_text() for page in ROOT.glob("backdoor_gym/**/*.py"))
    table = (ROOT / "docs/own_network.md").read_text().split("## Messages")[1]
    rows = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)[2:]
    quoted = [re.split(r"[,;:(]| \.\.\.", row)[0].strip() for row in rows]
    assert len(quoted) > 8
    numbers = re.compile(r"\d+")
    for words in quoted:
        for part in filter(None, (part.strip() for part in numbers.split(words))):
            assert part in code, words


def test_each_promise_names_tests_that_there_are():
    table = (ROOT / "docs/threat_model.md").read_text().partition("| promise | held by |")[2].partition("\n\n")[0]
    rows = [row.strip("| ").rpartition(" | ") for row in table.splitlines()[2:]]
    assert len(rows) > 10
    for promise, _, held in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", held)
        assert tests, promise
        assert len(tests) == held.count("`") / 2, promise
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_have_the_options_that_they_are_shown_with(page):
    commands = typer.main.get_command(app).commands
    for line in re.findall(r"^    backdoor-gym (.*)", page.read_text().replace("\\\n", ""), re.MULTILINE):
        name, *words = shlex.split(line, comments=True)
        if {"[", "|"} & set(line):
            continue  # a pattern of commands, not one
        command = commands[name]
        if hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(name, words)  # raises where it would be refused
