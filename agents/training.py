"""Training the general policy, from many infected models to a file: the whole way is ``train``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .encoder import EncoderOptions
from .look_ahead import LookAhead
from .onp import ONP
from .school import MAX_STEPS, names_of, school
from .validation import Validation
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
#: Triggered images in training; danger is a mean over them.
SCORE_SAMPLES = 64
#: Rollouts between two validations.
VALIDATE_EVERY = 4

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
    look_ahead: LookAhead | None = LookAhead(),  # noqa: B008 (it is immutable)
    tensorboard_log: str | Path | None = None,
    progress_bar: bool = False,
    report: Report | None = None,
    **ppo: Any,
) -> ONP:
    """Train a policy on many models, keep the best on others, and write it to a file.

    Interrupted and called again it goes on after the last rollout, and comes to what it would have come to without. Until
    the end the checkpoint and the best policy so far lie beside ``out``, and what is there stays as it is.

    Args:
        infected: names and patterns to learn from; their triggers must be known.
        validation: names and patterns that the best policy is chosen on.
        total_timesteps: steps of reinforcement.
        out: file of the policy.
        seed: of everything.
        envs: sub-environments; the models are divided among them.
        jobs: processes that make the examples of the warm start.
        epochs: passes of the warm start over the models, 0 for none.
        encoder: shape of the network.
        guide: the examples of the warm start, where they are made already.
        look_ahead: of the policy in the file; it learns without.
        tensorboard_log: folder for TensorBoard.
        progress_bar: whether to draw bars.
        report: called with each line of text for people.
        ppo: arguments of ``MaskablePPO``.
    """
    say = report or (lambda line: None)
    out, checkpoint, kept = Path(out), checkpoint_of(out), best_of(out)
    if not checkpoint.is_file():
        kept.unlink(missing_ok=True)  # of an earlier training: not to be compared with
    names, judges = names_of(infected), names_of(validation)
    vector = school(names, envs, seed=seed, reward="oracle", score_samples=SCORE_SAMPLES)
    say(f"{len(names)} models to learn from, {len(judges)} to choose by")
    settings = {**(PPO_AFTER_WARM_START if epochs else {}), **ppo}
    onp = ONP(vector, threshold=THRESHOLD, encoder=encoder, seed=seed, tensorboard_log=tensorboard_log, **settings)

    if epochs and not checkpoint.is_file():  # supervised, by the derivatives of these models
        guide = guide or examples(names, jobs=jobs, score_samples=SCORE_SAMPLES, progress=progress_bar)
        losses = warm_start(onp.network, guide, epochs, seed=seed, progress=progress_bar)
        say(f"warm start: cross-entropy {losses[0]:.2f} -> {losses[-1]:.2f}")

    chooses = validation_of(onp, judges, kept, say)
    onp.learn(total_timesteps, callback=chooses, checkpoint=checkpoint, progress_bar=progress_bar)  # reinforcement
    vector.close()

    onp = ONP.load(kept, look_ahead=look_ahead)
    onp.facts |= {
        "seed": seed,
        "models": len(names),
        "learned_on": list(infected),
        "chosen_on": list(validation),
        "timesteps": int(onp.facts["validation"]["timesteps"]),  # of the best policy, not of the last
    }
    onp.save(out)
    end(out)
    return onp


def validation_of(onp: ONP, judges: Sequence[str], out: Path, say: Report) -> Validation:
    """The validation of every training: on these models, as an episode of training is, and reported in one line."""
    return Validation(
        onp,
        judges,
        out,
        every=VALIDATE_EVERY,
        report=lambda figures: say(", ".join(f"{key} {value:.3f}" for key, value in figures.items())),
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
