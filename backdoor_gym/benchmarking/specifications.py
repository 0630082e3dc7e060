"""Policies as a benchmark is told of them: ``NAME[:THRESHOLD][:OPTION=VALUE]``, ``package.module:factory``, or a function."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..policies.registry import POLICIES, SUFFIX, check_policy, kind_of_policy, make_policy, options_of
from ..policies.thresholds import BUDGET, parse_threshold
from ..wording import shown

#: The budget of a policy that runs as it was published: its own stopping rule and its own default guard.
OWN = None
#: Those whose seed changes nothing, unless they learn on the network: a policy that was trained already acts as it does.
UNSEEDED = ("onp",)

Factory = Callable[[Any, int], Any]
Maker = str | Factory
Policies = Sequence[str] | Mapping[str, Maker]


def named(policies: Policies, budgets: Sequence[float | None]) -> dict[str, Maker]:
    """Makers of policies by the name that they have in the tables.

    Raises:
        UnknownNameError: no such policy.
        DataError: an unusable specification, or one that cannot be run under a budget.
    """
    if not isinstance(policies, Iterable) or isinstance(policies, str | bytes):
        raise DataError(f"policies must be a list of specifications, or a mapping, not {shown(policies)}")
    pairs = policies.items() if isinstance(policies, Mapping) else [(policy, policy) for policy in policies]
    for name, maker in pairs:
        if not isinstance(name, str) or not (isinstance(maker, str) or callable(maker)):
            raise DataError(f"a policy must be a specification, or in a mapping a factory, not {shown(maker)}")
    makers: dict[str, Maker] = dict(pairs)
    if not makers:
        raise DataError("no policy was given")
    for name, maker in makers.items():
        parsed = _parse(maker)
        if OWN in budgets and not callable(parsed) and BUDGET in parsed[1].values() and own_budget(maker) is None:
            raise DataError(f"{name} needs an accuracy budget, and as published it has none: leave that budget out")
    return makers


def make(maker: Maker, env: Any, budget: float | None, seed: int) -> Any:
    """The policy for an environment.

    A rule without a threshold in its specification has the published one as ``OWN``. Under a budget it has none and goes on
    until the episode ends, so it is at its best there.
    """
    parsed = _parse(maker)
    if callable(parsed):
        return parsed(env, seed)
    name, options = parsed
    threshold = POLICIES[kind_of_policy(name)].threshold
    if threshold is not None and budget is not OWN:
        options.setdefault(threshold, BUDGET)
    if "seed" in options_of(name):
        options["seed"] = seed
    return make_policy(name, env, options)


def own_budget(maker: Maker) -> float | None:
    """The accuracy budget with which a policy runs as ``OWN``: that of its kind, 0.02 for a user's."""
    parsed = _parse(maker)
    return 0.02 if callable(parsed) else POLICIES[kind_of_policy(parsed[0])].budget


def is_seeded(maker: Maker) -> bool:
    """Whether a seed changes what the policy does."""
    parsed = _parse(maker)
    if callable(parsed):
        return True
    kind = kind_of_policy(parsed[0])
    return "seed" in options_of(kind) and (kind not in UNSEEDED or bool(parsed[1].get("finetune")))


def described(maker: Maker) -> str:
    """The specification, or the name of a function with its arguments: the same in every process."""
    return maker if isinstance(maker, str) else _function(maker)


def version(name: str) -> str:
    """What changes with what is in a file; "" for what is none."""
    return sha256(Path(name).read_bytes()).hexdigest()[:12] if Path(name).is_file() else ""


def _function(factory: Factory) -> str:
    if isinstance(factory, partial):
        arguments = [repr(value) for value in factory.args]
        arguments += [f"{key}={value!r}" for key, value in sorted(factory.keywords.items())]
        return " ".join([_function(factory.func), *arguments])
    function = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{function.__module__}:{function.__qualname__}"


def _parse(maker: Maker) -> tuple[str, dict[str, Any]] | Factory:
    """Name and options, or a function of an environment and a seed."""
    if not isinstance(maker, str):
        return maker
    name, *settings = maker.split(":")
    if settings and name not in POLICIES and not name.endswith(SUFFIX):
        return _import(name, ":".join(settings))
    threshold = POLICIES[kind_of_policy(name)].threshold
    options: dict[str, Any] = {}
    for setting in settings:
        key, is_option, value = setting.rpartition("=")
        if not is_option:
            if threshold is None:
                raise DataError(f"{name} takes no threshold, so not {maker}")
            key = threshold
        if key == "seed":
            raise DataError(f"the seeds of {maker} are those of the benchmark: leave seed= out")
        options[key] = parse_threshold(value) if key == threshold else _value(maker, value)
    check_policy(name, options)
    return name, options


def _value(text: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        raise DataError(f"the options of a policy are numbers, true or false, not {value!r} as in {text}") from None


def _import(module: str, name: str) -> Factory:
    """A user's factory, from an installed module or one in the working folder."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's code, which can raise anything
        raise DataError(f"the policy {module}:{name} cannot be imported: {error}") from error
    if not callable(factory):
        raise DataError(f"{module}:{name} is no function of an environment and a seed")
    return factory
