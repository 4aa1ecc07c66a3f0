"""A drawn call over plain tensors of its own, of any framework."""

import numpy as np
from frameworks import NUMPY

from fuzz import calls
from fuzz.drawing import Case, members


def is_plain(case: Case) -> bool:
    """Small, not empty, and to be served."""
    small = all(block.image.size < 1 << 16 for block in case.blocks)
    empty = any(0 in spec.shape for spec in case.specs())
    return small and not empty and not case.refused and not case.may_refuse


class Plain:
    def __init__(self, case: Case, framework=NUMPY):
        self.case, self.framework = case, framework

    def arguments(self) -> dict:
        """New tensors; what was one tensor in the case is one here."""
        made: dict = {}

        def tensor(spec):
            if spec not in made:
                values = spec.of(self.case.blocks[spec.block].image)
                if self.framework is NUMPY:
                    made[spec] = values.copy(order="C")
                else:
                    made[spec] = self.framework.tensor(values.astype(np.float64), spec.dtype)
            return made[spec]

        tensors = {name: tuple(map(tensor, specs)) if len(members(specs)) > 1 else tensor(specs)
                   for name, specs in self.case.tensors.items()}  # fmt: skip
        return tensors | self.case.options

    def results(self, arguments: dict, hostile=None, array=None) -> dict:
        """`hostile` stands for this array: where it comes back, what was written is there."""
        returned = calls.call(self.case, arguments)
        if hostile is not None:
            parts = returned if isinstance(returned, tuple) else (returned,)
            returned = tuple(array if part is hostile else part for part in parts)
        found = calls.results_of(self.case, returned, self.case.tensors["x"].shape[:-1])
        return {name: np.array(values) for name, values in found.items()}
