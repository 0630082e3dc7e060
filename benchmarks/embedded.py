"""Makes the infected models that come with the package.

    python benchmarks/embedded.py

Files that exist are left alone; remove one to make it again. Training differs in rounding between kinds of processors,
so a model made elsewhere is an equal one, not the same to the last bit.
"""

from pathlib import Path

import backdoor_gym
from backdoor_gym import infect
from backdoor_gym.zoo.training import Schedule

FOLDER = Path(backdoor_gym.__file__).parent / "embedded"
SCHEDULE = Schedule(epochs=10, batch_size=64, learning_rate=0.05, augment=False)
ARCHITECTURE = {"width": 40, "blocks": 4, "shape": "residual"}


def main() -> None:
    for attack, target in (("badnets", 3), ("blended", 7), ("clean", 0)):
        path = FOLDER / f"digits-{attack}.safetensors"
        if path.exists():
            continue
        model = infect(
            "digits",
            "small_cnn",
            attack,
            target=target,
            schedule=SCHEDULE,
            architecture_options=ARCHITECTURE,
            clean_images=200,
            half=True,
            progress=True,
            name=path.stem,
        )
        model.save(path, half=True)
        print(path.name, model.facts["acc"], model.facts["asr"])


if __name__ == "__main__":
    main()
