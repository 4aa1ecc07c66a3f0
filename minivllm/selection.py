"""Which kernels there are, and which one ran."""

from typing import NamedTuple

from . import _C


class Kernel(NamedTuple):
    """A kernel of an op: `kernel=name` forces it. `why_not` says why it cannot run here; empty when `usable`."""

    op: str
    name: str
    dtype: str
    isa: str
    usable: bool
    why_not: str


class Ran(NamedTuple):
    """The kernel that a call ran, and why it was chosen."""

    op: str
    name: str
    why: str


def kernels(op: str | None = None) -> list[Kernel]:
    """The kernels of `op`, or of all ops, in the order in which they are listed.

    fused_add_rms_norm is add_rms_norm in place, and has its kernels. ValueError for an op that does not exist.
    """
    rows = [Kernel(*row) for row in _C.kernels()]
    if op is None:
        return rows
    of_op = [row for row in rows if row.op == {"fused_add_rms_norm": "add_rms_norm"}.get(op, op)]
    if not of_op:
        raise ValueError(f"kernels: there is no op {op!r}; the ops are {', '.join(dict.fromkeys(r.op for r in rows))}")
    return of_op


def last_kernel() -> Ran | None:
    """What the last call in this thread ran, or None when nothing has run."""
    ran = _C.last_kernel()
    return Ran(*ran) if ran else None
