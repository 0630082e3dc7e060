"""Makes the infected models that come with the package.

    python benchmarks/embedded.py

Files that exist are left alone; remove one to make it again. Training differs in rounding between kinds of processors,
so a model made elsewhere is an equal one, not the same to the last bit.
"""

from pathlib import Path

import torch

import backdoor_gym
from backdoor_gym import infect
from backdoor_gym.models.training import Schedule

FOLDER = Path(backdoor_gym.__file__).parent / "embedded"
SCHEDULE = Schedule(epochs=40, batch_size=64, learning_rate=0.2, weight_decay=0.01, augment=False)
# Seeds were looked through for digits-badnets to be one that CLP repairs, to show what it does; on most digits networks
# it finds nothing (benchmarks/README.md). The others are the first seed.
MODELS = (("badnets", 3, 3), ("blended", 7, 0), ("clean", 0, 0))


def main() -> None:
    torch.set_num_threads(1)
    for attack, target, seed in MODELS:
        path = FOLDER / f"digits-{attack}.safetensors"
        if path.exists():
            continue
        model = infect(
            "digits",
            "resnet18",
            attack,
            target=target,
            seed=seed,
            schedule=SCHEDULE,
            architecture_options={"width": 8},
            clean_images=200,
            half=True,
            progress=True,
            name=path.stem,
        )
        model.save(path, half=True)
        print(path.name, model.facts["acc"], model.facts["asr"])


if __name__ == "__main__":
    main()
