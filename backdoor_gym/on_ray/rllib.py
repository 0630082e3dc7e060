"""ONP's network under RLlib (https://docs.ray.io/en/latest/rllib), for training on a cluster.

RLlib collects the episodes on every machine and learns on one. The weights are those of ``ONP``: what is trained here is saved,
loaded and used like any other policy. Needs the extra ``ray``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical
from ray.rllib.core.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.tune.registry import register_env
from torch import Tensor

from backdoor_gym.agents.encoder import PADDING, EncoderOptions, GraphActorCritic
from backdoor_gym.agents.onp import ONP, PPO
from backdoor_gym.agents.school import BUDGETS, MAX_STEPS
from backdoor_gym.agents.training import (
    PPO_AFTER_WARM_START,
    SCORE_SAMPLES,
    THRESHOLD,
    VALIDATE_EVERY,
    Report,
    best_of,
    checkpoint_of,
    end,
    validation_of,
)
from backdoor_gym.agents.warm_start import GAMMA, examples, warm_start
from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.models.catalogue import resolve
from backdoor_gym.on_ray.cluster import cluster
from backdoor_gym.session.generator import InfectedGenerator
from backdoor_gym.session.prepared_model import Preparation

#: Name under which RLlib knows the environment.
ENVIRONMENT = "BackdoorPrune-v0, of many networks"


class GraphRLModule(TorchRLModule, ValueFunctionAPI):
    """``GraphActorCritic`` as an RLlib module, with the actions that are not legal masked.

    ``model_config`` has ``encoder``, the arguments of ``EncoderOptions``, and may have ``weights``, arrays by name to begin with.
    """

    def setup(self) -> None:
        self.network = GraphActorCritic(EncoderOptions(**self.model_config["encoder"]))
        self.action_dist_cls = TorchCategorical
        weights = self.model_config.get("weights")
        if weights is not None:
            self.network.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in weights.items()})

    def get_exploration_action_dist_cls(self) -> type[TorchCategorical]:
        return TorchCategorical

    get_inference_action_dist_cls = get_train_action_dist_cls = get_exploration_action_dist_cls

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        observation = batch[Columns.OBS]
        logits, _ = self.network(observation)
        return {Columns.ACTION_DIST_INPUTS: logits.masked_fill(observation["action_mask"] == 0, PADDING)}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        return self.network(batch[Columns.OBS])[1].squeeze(1)


class VaryingBudget(gym.Wrapper[Any, Any, Any, Any]):
    """Another accuracy budget in each episode; the observation tells which."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            self._budgets = np.random.default_rng(seed)
        elif not hasattr(self, "_budgets"):
            self._budgets = np.random.default_rng()
        self.env.unwrapped.accuracy_budget = float(self._budgets.choice(BUDGETS))  # type: ignore[attr-defined]
        return self.env.reset(seed=seed, options=options)


def train_on_cluster(
    infected: Sequence[str],
    validation: Sequence[str],
    total_timesteps: int,
    out: str | Path,
    address: str,
    *,
    runners: int = 2,
    envs: int = 4,
    seed: int = 0,
    epochs: int = 50,
    encoder: EncoderOptions | None = None,
    report: Report | None = None,
    **ppo: Any,
) -> ONP:
    """Train a policy with RLlib's PPO on a Ray cluster, keep the best on other models, and write it to a file.

    The warm start and the choices are those of ``training.train``: only the look-ahead is not chosen here.
    Interrupted and called again it goes on with the weights after the last iteration.

    Args:
        infected: names and patterns to learn from; their triggers must be known.
        validation: names and patterns that the best policy is chosen on.
        total_timesteps: environment steps.
        out: file of the policy.
        address: of the cluster: HOST:PORT, "auto", or "local".
        runners: processes of the cluster that play, one core each; they divide the models.
        envs: environments of each.
        seed: of everything.
        epochs: passes of the warm start over the models, 0 for none.
        encoder: shape of the network.
        report: called with a line of text whenever there is something to say.
        ppo: arguments of RLlib's ``AlgorithmConfig.training``.

    Raises:
        DataError: there is no cluster at that address.
    """
    say = report or (lambda line: None)
    out, checkpoint, kept = Path(out), checkpoint_of(out), best_of(out)
    names, judges = ([name for pattern in patterns for name in resolve(pattern)] for patterns in (infected, validation))
    onp = ONP(encoder=encoder or EncoderOptions(message_passing=False), seed=seed, threshold=THRESHOLD)
    done = 0
    if checkpoint.is_file():
        begun = ONP.load(checkpoint)
        onp.network.load_state_dict(begun.network.state_dict())
        done = int(begun.facts["timesteps"])
    else:
        kept.unlink(missing_ok=True)
    say(f"{len(names)} models to learn from, {len(judges)} to choose by")
    if epochs and not checkpoint.is_file():
        school = examples(names, ray=address, score_samples=SCORE_SAMPLES)
        losses = warm_start(onp.network, school, epochs, seed=seed)
        say(f"warm start: cross-entropy {losses[0]:.2f} -> {losses[-1]:.2f}")

    best = validation_of(onp, judges, kept, say)
    if kept.is_file():
        best.best = ONP.load(kept).facts.get("validation")
    with cluster(address):
        algorithm = _configuration(onp, names, runners, envs, seed, bool(epochs), ppo).build_algo()
        try:
            onp.facts["timesteps"] = done
            onp.save(checkpoint)
            best.validate(done)
            iteration = 0
            while done < total_timesteps:
                algorithm.train()
                module = algorithm.get_module(DEFAULT_MODULE_ID)
                onp.network.load_state_dict(module.network.state_dict())
                done += runners * envs * _rollout(ppo)
                iteration += 1
                onp.facts["timesteps"] = done
                onp.save(checkpoint)
                if iteration % VALIDATE_EVERY == 0 or done >= total_timesteps:
                    best.validate(done)
        finally:
            algorithm.stop()
    onp = ONP.load(kept)
    onp.facts |= {"seed": seed, "models": len(names), "learned_on": list(infected), "chosen_on": list(validation)}
    onp.facts["timesteps"] = int(onp.facts["validation"]["timesteps"])
    onp.save(out)
    end(out)
    return onp


def _rollout(ppo: Mapping[str, Any]) -> int:
    """Steps of one environment between two updates."""
    return int(ppo.get("n_steps", PPO_AFTER_WARM_START["n_steps"]))


def _configuration(
    onp: ONP, names: list[str], runners: int, envs: int, seed: int, warm: bool, ppo: dict[str, Any]
) -> PPOConfig:
    usual = PPO | (PPO_AFTER_WARM_START if warm else {})
    steps = _rollout(ppo)
    training = {
        "lr": usual["learning_rate"],
        "gamma": GAMMA,
        "lambda_": usual["gae_lambda"],
        "clip_param": usual["clip_range"],
        "entropy_coeff": usual["ent_coef"],
        "num_epochs": usual["n_epochs"],
        "minibatch_size": usual["batch_size"],
        "train_batch_size_per_learner": runners * envs * steps,
        "use_kl_loss": False,
        "vf_clip_param": 1e6,  # a clipped error would not be learned from
        "grad_clip": 0.5,
        **{key: value for key, value in ppo.items() if key != "n_steps"},
    }
    register_env(ENVIRONMENT, whole_network)
    context = {"infected": names, "max_units": max_units(names)}
    spec = RLModuleSpec(
        module_class=GraphRLModule,
        model_config={
            "encoder": asdict(onp.options),
            "weights": {key: value.cpu().numpy() for key, value in onp.network.state_dict().items()},
        },
    )
    config = (
        PPOConfig()
        .environment(ENVIRONMENT, env_config=context, disable_env_checking=True)
        .env_runners(
            num_env_runners=runners,
            num_envs_per_env_runner=envs,
            rollout_fragment_length=steps,
            batch_mode="truncate_episodes",
        )
        .training(**training)
        .debugging(seed=seed)
    )
    return config.rl_module(rl_module_spec=spec)


def max_units(names: Sequence[str]) -> int:
    """Neurons of the largest of some networks."""
    return InfectedGenerator(names, Preparation()).max_units()


def whole_network(context: Any) -> gym.Env[Any, Any]:
    """The single-agent environment, of this runner's share of the models."""
    return VaryingBudget(
        BackdoorPruneEnv(
            _share(context),
            reward="oracle",
            score_samples=SCORE_SAMPLES,
            max_steps=MAX_STEPS,
            max_units=context["max_units"],
        )
    )


def _share(context: Any) -> list[str]:
    """The models of one runner: no two prepare the same, where there are enough."""
    names = list(context["infected"])
    index, count = max(0, getattr(context, "worker_index", 0) - 1), max(1, getattr(context, "num_workers", 1))
    return names[index::count] or names
