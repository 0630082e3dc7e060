"""How much memory a piece of work took at most."""

from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Most resident memory of this process since it was made, as Linux tells it."""

    def __init__(self) -> None:
        try:
            _RESET.write_text("5", encoding="ascii")  # 5 sets the high-water mark back, see proc(5)
            self._known = True
        except OSError:
            self._known = False

    def bytes(self) -> int | None:
        """None where the system does not tell."""
        if not self._known:
            return None
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
