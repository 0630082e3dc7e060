"""The policies that ship, by name: one line each."""

from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

from ..arguments import check_kind, check_whole
from ..errors import check_name
from .contract import PredictingPolicy


@dataclass(frozen=True)
class Registered:
    """A policy by name.

    Attributes:
        home: "module:name" of what makes it, called with the options, and with ``env``, ``accuracy_budget`` and ``file`` where
            it takes them. It is imported when it is asked for.
        budget: clean accuracy that it may lose by default; None is no guard, as a rule with a threshold was published.
        threshold: what it calls its threshold, None where it has none.
    """

    home: str
    budget: float | None = 0.02
    threshold: str | None = None


_HERE = "backdoor_gym.baselines"
POLICIES: dict[str, Registered] = {
    "onp": Registered("backdoor_gym.agents.repairing:onp", 0.01),
    "ridge": Registered("backdoor_gym.agents.repairing:ridge"),
    "clp": Registered(f"{_HERE}:CLP", None, "u"),
    "bnp": Registered(f"{_HERE}:BNP", None, "threshold"),
    "ep": Registered(f"{_HERE}:EP", None, "threshold"),
    "anp": Registered(f"{_HERE}:ANP", None, "threshold"),
    "rnp": Registered(f"{_HERE}:RNP", threshold="threshold"),
    "fine-pruning": Registered(f"{_HERE}:FinePruning", threshold="threshold"),
    "magnitude": Registered(f"{_HERE}:Magnitude", threshold="threshold"),
    "greedy": Registered(f"{_HERE}:GreedyACC"),
    "random": Registered(f"{_HERE}:RandomPolicy"),
}
#: A file of a policy that ``ONP.save`` wrote is named by its path.
SUFFIX = ".safetensors"
#: Clean accuracy that "auto" may lose where the environment has no budget.
_AUTO_BUDGET = 0.02
_GIVEN = {"env", "accuracy_budget", "file"}


def kind_of_policy(name: str) -> str:
    """The name itself, or "onp" for a policy file.

    Raises:
        UnknownNameError: no such policy.
    """
    if isinstance(name, str) and is_onp(name):
        return "onp"
    check_name("policy", name, POLICIES, "or the path of a policy file, *.safetensors")
    return name


def is_onp(name: str) -> bool:
    """Whether a repair's policy is the learned one, that comes with the package or out of a file."""
    return name == "onp" or name.endswith(SUFFIX)


def options_of(name: str) -> tuple[str, ...]:
    """The options that a policy takes by name, as its signature has them.

    Raises:
        UnknownNameError: no such policy.
    """
    return tuple(option for option in signature(_maker(name)).parameters if option not in _GIVEN)


def check_policy(name: str, options: dict[str, Any]) -> None:
    """Find out before the work that a name or an option is unknown.

    Raises:
        UnknownNameError: no such policy, or it has no such option.
        DataError: an unusable option.
    """
    known = options_of(name)
    for option in options:
        owners = [] if option in known else [other for other in POLICIES if option in options_of(other)]
        hint = f"{option} is an option of {', '.join(owners)}" if owners else ""
        check_name(f"option of {kind_of_policy(name)}", option, known, hint)
    for option, least in (("finetune", 0), ("steps", 1), ("candidates", 1), ("seed", 0)):
        check_whole(option, options.get(option, least), least)
    check_kind("look_ahead", options.get("look_ahead", True), bool, "True or False")


def make_policy(name: str, env: Any, options: dict[str, Any]) -> PredictingPolicy:
    """The policy of that name, or of that file, for that ``BackdoorPruneEnv``.

    Raises:
        UnknownNameError: no such policy, or it has no such option.
        ModelFileError: an unreadable policy file.
    """
    check_policy(name, options)
    maker = _maker(name)
    given = {
        "env": env,
        "accuracy_budget": _AUTO_BUDGET if env.accuracy_budget is None else env.accuracy_budget,
        "file": name if name.endswith(SUFFIX) else None,
    }
    taken = signature(maker).parameters
    policy: PredictingPolicy = maker(**{key: value for key, value in given.items() if key in taken}, **options)
    return policy


def _maker(name: str) -> Any:
    module, _, attribute = POLICIES[kind_of_policy(name)].home.partition(":")
    return getattr(import_module(module), attribute)
