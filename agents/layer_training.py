"""Training the policy that the agents of all layers share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backdoor_gym.envs.layers import owners
from backdoor_gym.models.catalogue import resolve
from backdoor_gym.session.generator import InfectedGenerator
from backdoor_gym.session.prepared_model import VictimOptions

from .encoder import EncoderOptions
from .layers import LAYER_ENCODER, PER_LAYER, LayerPolicy, LayersVecEnv, by_layer
from .onp import ONP
from .training import PPO_AFTER_WARM_START, SCORE_SAMPLES, Report, best_of, checkpoint_of, end, validation_of
from .warm_start import Example, examples, warm_start

#: Rounds of an episode; in each every layer may prune a neuron.
MAX_ROUNDS = 20
#: Rounds between two updates; each is as many steps as there are agents.
ROLLOUT = 16


def train_layers(
    infected: Sequence[str],
    validation: Sequence[str],
    total_timesteps: int,
    out: str | Path,
    *,
    seed: int = 0,
    seats: int = 8,
    jobs: int = 1,
    epochs: int = 50,
    encoder: EncoderOptions = LAYER_ENCODER,
    guide: Sequence[Example] | None = None,
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    report: Report | None = None,
    **ppo: Any,
) -> ONP:
    """Train per-layer agents on some models, keep the best of their policy on others, and write it to a file.

    Interrupted and called again it goes on after the last rollout.

    Args:
        infected: names and patterns to learn from; their triggers must be known.
        validation: names and patterns that the best policy is chosen on, repaired one network at a time.
        total_timesteps: steps of agents; a round is one of each.
        out: file of the policy.
        seed: of everything.
        seats: networks played at once.
        jobs: processes that the examples of the warm start are made in.
        epochs: passes of the warm start over the models, 0 for none.
        encoder: shape of the network.
        guide: examples of the models for the warm start, of whole networks, where they are made already.
        tensorboard_log: folder for TensorBoard.
        progress_bar: whether to draw one.
        report: called with a line of text whenever there is something to say.
        ppo: arguments of ``MaskablePPO``.

    Raises:
        DataError: fewer models than seats.
    """
    say = report or (lambda line: None)
    out, checkpoint, kept = Path(out), checkpoint_of(out), best_of(out)
    if not checkpoint.is_file():
        kept.unlink(missing_ok=True)
    names, judges = ([name for pattern in patterns for name in resolve(pattern)] for patterns in (infected, validation))
    vector = LayersVecEnv(names, seats, reward="oracle", score_samples=SCORE_SAMPLES, max_steps=MAX_ROUNDS)
    vector.seed(seed)
    say(f"{len(names)} models to learn from, {len(judges)} to choose by, {vector.num_envs} agents at once")
    settings = {**(PPO_AFTER_WARM_START if epochs else {}), "n_steps": ROLLOUT, **ppo}
    onp = ONP(vector, encoder=encoder, seed=seed, tensorboard_log=tensorboard_log, **settings)
    onp.facts[PER_LAYER] = True
    if epochs and not checkpoint.is_file():
        guide = guide or examples(names, jobs=jobs, score_samples=SCORE_SAMPLES, progress=progress_bar)
        losses = warm_start(
            onp.network,
            [one for name, whole in zip(names, guide, strict=True) for one in split(name, whole)],
            epochs,
            batch_size=64,
            seed=seed,
            progress=progress_bar,
        )
        say(f"warm start: cross-entropy {losses[0]:.2f} -> {losses[-1]:.2f}")

    best = validation_of(onp, judges, kept, say, lambda env: LayerPolicy(onp, env))
    onp.learn(total_timesteps, callback=[best], checkpoint=checkpoint, progress_bar=progress_bar)
    say(f"{vector.tried} prunes tried")
    vector.close()
    onp = ONP.load(kept)
    onp.facts |= {"seed": seed, "models": len(names), "learned_on": list(infected), "chosen_on": list(validation)}
    onp.facts["timesteps"] = int(onp.facts["validation"]["timesteps"])
    onp.save(out)
    end(out)
    return onp


def split(name: str, example: Example) -> list[Example]:
    """An example of a network by its name, as examples of its layers."""
    return by_layer(example, owners(InfectedGenerator(name, VictimOptions()).get(name).defender))
