"""How many steps ANP needs, on networks that everything is chosen with, one of each attack: never test models.

    python benchmarks/anp_steps.py

The published code makes 2,000 steps of 128 images, which on the 200 images of a digits network are 1,280 epochs. Cells, table and
figures go to ``results/anp_steps``; killed and called again it goes on.
"""

import argparse
from pathlib import Path

from backdoor_gym import benchmark

RESULTS = Path(__file__).parent / "results"
#: Blended, BadNets, WaNet and SIG.
MODELS = [f"digits-val/{seed}" for seed in (1, 2, 7, 9)]
STEPS = (100, 300, 2_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    policies = [f"anp:steps={steps}" for steps in STEPS]
    done = benchmark(
        MODELS, policies, (None, 0.01, 0.02, 0.05), jobs=arguments.jobs, out=RESULTS / "anp_steps", progress=True
    )
    print(done.table)


if __name__ == "__main__":
    main()
