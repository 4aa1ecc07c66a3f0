"""How much more memory a call holds at its peak than before it: shows whether a library copies the weights."""

import ctypes
from collections.abc import Callable
from pathlib import Path


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that counts kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Growth of the resident set from before a call to its peak; None where Linux does not tell."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this one takes
    reset.write_text("5")  # the peak starts again from what is resident now
    before = status_bytes("VmRSS")
    call()
    return max(status_bytes("VmHWM") - before, 0)
