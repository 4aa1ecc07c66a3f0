"""What the ops take, as C describes them: what the modules of the frameworks are made from, and tests compare with."""

from typing import Any, NamedTuple

from . import _C


class Parameter(NamedTuple):
    """A parameter of an op.

    type: "tensor", "tensors" (one, or a tuple), "integers" or "flags" (a tensor of them), "number", "integer", "flag",
    "choice" or "text".
    role: "rows" of a tensor whose rows do not depend on each other, "weight" of one that is the same for all rows,
    "output", "in place" of one that is read and written, or "option" of what is no tensor.
    optional: it may be None. required: it has no default. positional: it may be given by position.
    members: of "tensors", the names of those of a tuple, such as ("q", "k", "v").
    """

    name: str
    type: str
    role: str
    optional: bool
    required: bool
    positional: bool
    default: Any
    members: tuple[str, ...]


OPS = {op: tuple(Parameter(*row) for row in rows) for op, rows in _C._ops().items()}


def type_of(op: str, name: str) -> str:
    """The type of a parameter of `op`."""
    return next(parameter.type for parameter in OPS[op] if parameter.name == name)


def names(op: str, *roles: str) -> list[str]:
    """The parameters of `op` that have one of these roles."""
    return [parameter.name for parameter in OPS[op] if parameter.role in roles]
