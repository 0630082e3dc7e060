"""How much memory a piece of work took at most."""

import re
from contextlib import suppress
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Most resident memory of this process since it was made, as Linux tells it."""

    def __init__(self) -> None:
        self._known = False
        with suppress(OSError):
            _RESET.write_text("5", encoding="ascii")  # 5 sets the high-water mark back, see proc(5)
            self._known = True

    def bytes(self) -> int | None:
        """None where the system does not tell."""
        line = re.search(r"^VmHWM:\s*(\d+)", _STATUS.read_text(encoding="utf-8"), re.M) if self._known else None
        return None if line is None else int(line[1]) * 1024
