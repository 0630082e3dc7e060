"""``python -m backdoor_gym.cli``: the same as ``backdoor-gym``."""

from . import main

if __name__ == "__main__":
    main()
