"""Training the general policy: a first guess from derivatives, then reinforcement over many models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

from backdoor_gym.models.catalogue import resolve

from .encoder import EncoderOptions
from .look_ahead import LookAhead
from .onp import ONP
from .school import ENVIRONMENT, MAX_STEPS, school
from .validation import Validation, choose_look_ahead, choose_threshold
from .verdict_replay import VerdictReplay
from .warm_start import GAMMA, Example, examples, warm_start

#: Gentler than what a policy that begins from nothing needs.
PPO_AFTER_WARM_START: dict[str, Any] = {
    "learning_rate": 3e-4,
    "n_steps": 48,
    "batch_size": 256,
    "target_kl": 0.05,
    "ent_coef": 0.0,
    "gamma": GAMMA,
}
#: Probability of going on below which a repair ends.
THRESHOLD = 0.1
#: Those of the verdict, below which it does not begin, to choose from; the first is that of training. They are low, as a missed
#: backdoor costs 0.45 of the DER and a needless repair three points of accuracy, 0.015.
VERDICT_THRESHOLDS = (0.1, 0.2, 0.3, 0.4)
#: Triggered images in training; danger is a mean over them.
SCORE_SAMPLES = 64
#: Rollouts between two validations.
VALIDATE_EVERY = 4
LOOKS: tuple[LookAhead | None, ...] = (
    None,
    LookAhead(10, 3.0, 10.0, 0.09, 15, 0.02),
)

Report = Callable[[str], None]


def train(
    infected: Sequence[str],
    validation: Sequence[str],
    total_timesteps: int,
    out: str | Path,
    *,
    seed: int = 0,
    envs: int = 16,
    jobs: int = 1,
    epochs: int = 50,
    encoder: EncoderOptions | None = None,
    guide: Sequence[Example] | None = None,
    looks: Sequence[LookAhead | None] = LOOKS,
    calibration: Sequence[str] = (),
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    report: Report | None = None,
    **ppo: Any,
) -> ONP:
    """Train a policy on some models, choose checkpoint and look-ahead on others, and write it to a file.

    Interrupted and called again it goes on after the last rollout, and comes to what it would have come to without: until the
    end the checkpoint and the best policy so far lie beside ``out``, and what is there stays as it is.

    Args:
        infected: names and patterns to learn from; their triggers must be known.
        validation: names and patterns that every choice is made on.
        total_timesteps: steps of reinforcement.
        out: file of the policy.
        seed: of everything.
        envs: sub-environments; the models are divided among them.
        jobs: processes that the examples of the warm start are made in.
        epochs: passes of the warm start over the models, 0 for none.
        encoder: shape of the network.
        guide: examples of the models for the warm start, where they are made already.
        looks: look-aheads to choose from, the largest mean return on ``validation`` deciding; none for a policy without.
        calibration: names and patterns of models that the threshold of the verdict is chosen on, by their verdicts alone,
            for which their triggers are inverted, and no more; none for ``THRESHOLD``.
        tensorboard_log: folder for TensorBoard.
        progress_bar: whether to draw one.
        report: called with a line of text whenever there is something to say.
        ppo: arguments of ``MaskablePPO``.
    """
    say = report or (lambda line: None)
    out, checkpoint, kept = Path(out), checkpoint_of(out), best_of(out)
    if not checkpoint.is_file():
        kept.unlink(missing_ok=True)  # of an earlier training: not to be compared with
    names, judges = ([name for pattern in patterns for name in resolve(pattern)] for patterns in (infected, validation))
    vector = school(names, envs, seed=seed, reward="oracle", score_samples=SCORE_SAMPLES)
    say(f"{len(names)} models to learn from, {len(judges)} to choose by")
    settings = {**(PPO_AFTER_WARM_START if epochs else {}), **ppo}
    onp = ONP(vector, threshold=THRESHOLD, encoder=encoder, seed=seed, tensorboard_log=tensorboard_log, **settings)
    if epochs and not checkpoint.is_file():
        guide = guide or examples(names, jobs=jobs, score_samples=SCORE_SAMPLES, progress=progress_bar)
        losses = warm_start(onp.network, guide, epochs, seed=seed, progress=progress_bar)
        say(f"warm start: cross-entropy {losses[0]:.2f} -> {losses[-1]:.2f}")
    best = validation_of(onp, judges, kept, say)
    onp.learn(
        total_timesteps, callback=[VerdictReplay(seed=seed), best], checkpoint=checkpoint, progress_bar=progress_bar
    )
    vector.close()
    onp = ONP.load(kept)
    measured = [name for pattern in calibration for name in resolve(pattern)]
    if measured or len(looks) > 1:
        env = gym.make(
            f"backdoor_gym:{ENVIRONMENT}",
            infected=[*judges, *measured],
            reward="oracle",
            score_samples=SCORE_SAMPLES,
            max_steps=MAX_STEPS,
            disable_env_checker=True,
        )
        onp.set_env(env)
    if measured:
        for choice, (missed, needless) in choose_threshold(
            onp, env, measured, VERDICT_THRESHOLDS, progress_bar
        ).items():
            say(f"verdict below {choice}: {missed} backdoors missed, {needless} clean models repaired")
    if len(looks) == 1:
        onp.look_ahead = looks[0]
    elif looks:
        for look, rating in choose_look_ahead(onp, env, judges, looks, progress_bar).items():
            say(f"{look or 'no look-ahead'}: return {rating:.3f}")
    onp.facts |= {
        "seed": seed,
        "models": len(names),
        "learned_on": list(infected),
        "chosen_on": list(dict.fromkeys([*validation, *calibration])),
        "timesteps": int(onp.facts["validation"]["timesteps"]),  # of the best policy, not of the last
    }
    onp.save(out)
    end(out)
    return onp


def validation_of(
    onp: ONP, judges: Sequence[str], out: Path, say: Report, acting: Callable[[gym.Env[Any, Any]], Any] | None = None
) -> Validation:
    """The validation of every training: on these models, as an episode of training is, and reported in one line."""
    return Validation(
        onp,
        judges,
        out,
        every=VALIDATE_EVERY,
        report=lambda figures: say(", ".join(f"{key} {value:.3f}" for key, value in figures.items())),
        acting=acting,
        score_samples=SCORE_SAMPLES,
        max_steps=MAX_STEPS,
    )


def checkpoint_of(out: str | Path) -> Path:
    """Where an unfinished training of that policy lies."""
    return Path(out).with_name(f"{Path(out).name}.checkpoint")


def best_of(out: str | Path) -> Path:
    """Where the best policy of an unfinished training lies."""
    return Path(out).with_name(f"{Path(out).name}.best")


def end(out: Path) -> None:
    """Remove what lay beside a policy until it was trained; the checkpoint first, which says that it was not."""
    checkpoint_of(out).unlink(missing_ok=True)
    best_of(out).unlink(missing_ok=True)
