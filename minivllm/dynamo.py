"""How torch.compile learns what stands for the ops, which are C functions that it cannot trace.

torch.compile lives in torch._dynamo, which takes a second to import and which most programs never load. So nothing
happens before somebody loads it: then, or at once where it is loaded already, minivllm.torch tells it.
"""

import functools
import sys
from importlib.machinery import PathFinder

_DYNAMO = "torch._dynamo"


def _tell():
    from . import torch

    torch.substitute_in_graphs()


class _Finder:
    """Finds torch._dynamo as Python itself would, and has it told when its import is done, once. It may be looked for
    without being imported."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == _DYNAMO else None
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _tell()

            spec.loader.exec_module = execute_and_tell
        return spec


@functools.cache
def watch():
    """Called when minivllm is imported; does nothing when it is reloaded."""
    if _DYNAMO in sys.modules:
        _tell()
    else:
        sys.meta_path.insert(0, _Finder())
