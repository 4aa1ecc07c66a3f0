"""Objects that change under the hands of who reads them, call the op on themselves, or claim impossible sizes. What goes
wrong here kills the process, so most of it runs in one of its own."""

import ctypes
import sys

import numpy as np
import pytest
from dlpack import Exporter
from processes import SANITIZED, succeeds

import minivllm
from minivllm import _C

WEIGHT = np.ones(8, np.float32)


# ---- what is taken away while it is read ---------------------------------------------------------------------------


TAKEN_AWAY = """
    import gc, minivllm, numpy as np

    class Numbers:
        '''Values for one key of the interface; iterating over them replaces those of another.'''

        def __init__(self, values, run=lambda: None):
            self.values, self.run, self.alive = values, run, True

        def __del__(self):
            self.alive = False

        def __iter__(self):
            assert self.alive, "it is gone"
            self.run()
            return iter(self.values)

    class Flag:
        def __init__(self, run):
            self.run = run

        def __bool__(self):
            self.run()
            return False

    def replace(interface, key):
        interface.pop(key, None)
        gc.collect()
        interface["filler"] = [Numbers((7,) * 9) for _ in range(1000)]

    class Array:
        def __init__(self, when, key):
            interface = self.interface = {}
            run = lambda: replace(interface, key)
            interface |= {
                "version": 3,
                "typestr": "".join(["<", "f4"]),
                "shape": Numbers((0, 8), run if when == "shape" else lambda: None),
                "strides": Numbers((32, 4), run if when == "strides" else lambda: None),
                "data": (int("1" * 18), Flag(run if when == "data" else lambda: None)),
                "stream": int("1" * 18),
            }

        @property
        def __cuda_array_interface__(self):
            return self.interface

    for when in ("shape", "strides", "data"):
        for key in ("typestr", "shape", "strides", "data", "stream"):
            try:
                minivllm.rms_norm(Array(when, key), np.ones(8, np.float32))
            except (BufferError, ValueError, RuntimeError) as error:
                assert "it is gone" not in str(error), (when, key, error)
                assert (when, key) != ("shape", "strides") or "malformed" not in str(error), error
"""


def test_an_interface_that_loses_what_is_being_read():
    """`strides` was fetched before `shape` was iterated over, and read after that had dropped it."""
    succeeds(TAKEN_AWAY)


def test_an_array_whose_memory_another_one_holds():
    """A subclass whose __array_struct__ is that of an array which nobody else keeps."""
    succeeds("""
        import gc, minivllm, numpy as np

        class Borrows(np.ndarray):
            @property
            def __array_struct__(self):
                gone = np.full((64, 4096), 2.0, np.float32)
                return gone.__array_struct__

        class Weight:
            '''Read after x.'''

            def __dlpack_device__(self):
                return (1, 0)

            def __dlpack__(self, **options):
                self.filler = [np.full((64, 4096), 5.0, np.float32) for _ in range(8)]
                self.filler[0][:, ::2] = 1
                return np.ones(4096, np.float32).__dlpack__()

        x = np.zeros((64, 4096), np.float32).view(Borrows)
        got = minivllm.rms_norm(x, Weight(), eps=0.0)
        assert abs(np.asarray(got) - 1).max() < 1e-6, got
    """)


# ---- an op on itself --------------------------------------------------------------------------------------------------


RECURSIVE = {
    "__dlpack__": """
        class Evil:
            def __dlpack_device__(self):
                return (1, 0)
            def __dlpack__(self, **options):
                return minivllm.rms_norm(self, weight)
        call = lambda: minivllm.rms_norm(Evil(), weight)
    """,
    "__dlpack_device__": """
        class Evil:
            def __dlpack_device__(self):
                minivllm.rms_norm_qkv(x, weight, self, 1, 1)
            def __dlpack__(self, **options):
                return x.__dlpack__()
        call = lambda: minivllm.rms_norm_qkv(x, weight, Evil(), 1, 1)
    """,
    "__cuda_array_interface__": """
        class Evil:
            @property
            def __cuda_array_interface__(self):
                return minivllm.add_rms_norm(x, self, weight)
        call = lambda: minivllm.add_rms_norm(x, Evil(), weight)
    """,
    "__float__": """
        class Evil:
            def __float__(self):
                return minivllm.rms_norm(x, weight, self)
        call = lambda: minivllm.rms_norm(x, weight, Evil())
    """,
    "__index__": """
        class Evil:
            def __index__(self):
                return minivllm.set_num_threads(self)
        call = lambda: minivllm.set_num_threads(Evil())
    """,
    "a layer": """
        class Evil:
            def __dlpack_device__(self):
                return (1, 0)
            def __dlpack__(self, **options):
                return layer(self)
        layer = minivllm.FusedRMSNormQKV(
            norm_weight=weight, qkv_weight=np.ones((24, 8), np.float32), num_heads=1, num_kv_heads=1
        )
        call = lambda: layer(Evil())
    """,
    "a view": """
        class Evil:
            def __dlpack_device__(self):
                return (1, 0)
            def __dlpack__(self, **options):
                return _C._view(self)
        call = lambda: _C._view(Evil())
    """,
}


@pytest.mark.parametrize("stack", [None, 256], ids=["main thread", "256 kB"])
@pytest.mark.parametrize("what", RECURSIVE)
def test_recursion(what, stack):
    """RecursionError, with the Python limit far away, too; and afterwards calls work as before."""
    if SANITIZED and stack:
        pytest.skip("frames of the sanitizer's are several times as large")
    succeeds(f"""
        import sys, threading, minivllm, numpy as np
        from minivllm import _C
        x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
        exec({RECURSIVE[what]!r}.replace("\\n        ", "\\n"))

        def body():
            for limit in (1000, 10**6):
                sys.setrecursionlimit(limit)
                for _ in range(2):
                    try:
                        call()
                    except RecursionError as error:
                        refused.append(str(error))
                assert (minivllm.rms_norm(x, weight) == minivllm.rms_norm(x, weight)).all()

        refused = []
        if {stack}:
            threading.stack_size({stack} * 1024)
            thread = threading.Thread(target=body)
            thread.start()
            thread.join()
        else:
            body()
        assert len(refused) == 4, refused
        assert "calls within calls have used up" in refused[-1], refused
    """)


def test_a_call_inside_of_a_call():
    """An exporter may well compute what it exports."""

    class Computed:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            return minivllm.rms_norm(2 * np.ones((2, 8), np.float32), WEIGHT).__dlpack__()

    twice = minivllm.rms_norm(np.ones((2, 8), np.float32), WEIGHT)
    assert abs(minivllm.rms_norm(Computed(), WEIGHT) - twice).max() < 1e-6


# ---- impossible sizes ---------------------------------------------------------------------------------------------------


class Sized(Exporter):
    """Claims a shape and strides of its own; strides None: none."""

    def __init__(self, shape, strides=None, data=None):
        super().__init__(np.ones((4, 8), np.float32) if data is None else data)
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        tensor = self.managed.tensor
        tensor.ndim, tensor.shape = len(shape), self.shape
        tensor.strides = None
        if strides is not None:
            self.strides = (ctypes.c_int64 * len(shape))(*strides)
            tensor.strides = self.strides


FAR = 1 << 62
HUGE = {
    "a span of 2^63 bytes": ((3, 8), (1 << 60, 1)),
    "a span of 2^64 bytes": ((3, 8), (1 << 61, 1)),
    "a stride of 2^63 - 1": ((2, 8), ((1 << 63) - 1, 1)),
    "a stride of -2^63": ((2, 8), (-(1 << 63), 1)),
    "a span that comes back to 0": ((5, 8), (FAR, 1)),
    "spans that add up to more": ((2, 2, 2, 2, 2, 8), (*[1 << 58] * 5, 1)),
    "spans that cancel": ((2, 2, 8), (1 << 61, -(1 << 61), 1)),
    "before the first address": ((2, 8), (-(1 << 57), 1)),
    "2^124 elements in one place": ((FAR, FAR, 8), (0, 0, 1)),
    "2^64 elements in one place": ((1 << 61, 8), (0, 1)),
    "2^124 elements without strides": ((FAR, FAR, 8), None),
}


@pytest.mark.parametrize("shape,strides", HUGE.values(), ids=HUGE)
def test_a_tensor_past_all_memory(shape, strides):
    x, matrix = np.ones((4, 8), np.float32), np.ones((24, 8), np.float32)
    wrong = r" has a shape, \[.*\], and strides that reach past all memory"
    with pytest.raises(ValueError, match=r"^rms_norm: x" + wrong):
        minivllm.rms_norm(Sized(shape, strides), WEIGHT)
    with pytest.raises(ValueError, match=r"^rms_norm_qkv: x" + wrong):
        minivllm.rms_norm_qkv(Sized(shape, strides), WEIGHT, matrix, 1, 1)
    with pytest.raises(ValueError, match=r"^add_rms_norm: (x|residual)" + wrong):
        minivllm.add_rms_norm(Sized(shape, strides), Sized(shape, strides), WEIGHT)
    with pytest.raises(ValueError, match=r"past all memory"):
        _C._view(Sized(shape, strides))
    if len(shape) == 2:
        with pytest.raises(ValueError, match=r"^rms_norm_qkv: qkv_weight" + wrong):
            minivllm.rms_norm_qkv(x, WEIGHT, Sized(shape, strides), 1, 1)
        out = np.empty((shape[0], 8), np.float32) if shape[0] < 9 else None
        if out is not None:
            with pytest.raises(ValueError, match=r"^rms_norm: out" + wrong):
                minivllm.rms_norm(out, WEIGHT, out=Sized(shape, strides))


def test_a_result_past_all_memory():
    """Of an x that repeats one row; refused before anything of that size is asked for."""
    x, matrix = Sized((1 << 52, 8), (0, 1)), Sized((3 << 16, 8), (0, 1))
    with pytest.raises(ValueError, match=r"^rms_norm_qkv: out has a shape, \[4503599627370496, 196608\], and strides"):
        minivllm.rms_norm_qkv(x, WEIGHT, matrix, 1, 1)


def test_a_tensor_without_a_shape():
    exporter = Exporter(np.ones((2, 8), np.float32))
    exporter.managed.tensor.shape = None
    with pytest.raises(BufferError, match=r"^rms_norm: x was exported without a shape"):
        minivllm.rms_norm(exporter, WEIGHT)
    assert exporter.deleted == exporter.exports


def test_sizes_that_are_empty_or_never_stepped_over():
    """Strides that nobody takes may be anything, and no tokens of any size are none."""
    x = np.ones((1, 8), np.float32)
    assert (minivllm.rms_norm(Sized((1, 8), (FAR, 1), x), WEIGHT) == minivllm.rms_norm(x, WEIGHT)).all()
    for shape in ((0, 1 << 40, 8), (1 << 40, 0, 8)):
        assert minivllm.rms_norm(Sized(shape, (FAR, FAR, 1)), WEIGHT).shape == shape


# ---- the extension's own machinery ---------------------------------------------------------------------------------------


def test_a_second_callable_class():
    """Layers are called through a pointer at one offset: a class of another size would move it under all of them."""
    succeeds("""
        import importlib, minivllm, numpy as np
        from minivllm import _C, layers
        weight, matrix, x = np.ones(8, np.float32), np.ones((24, 8), np.float32), np.ones((2, 8), np.float32)
        def make():
            return layers.FusedRMSNormQKV(norm_weight=weight, qkv_weight=matrix, num_heads=1, num_kv_heads=1)
        layer = make()
        class Big:
            '''With room for more.'''
            __slots__ = tuple("abcdefgh")
        try:
            _C._callable_layer(Big)
        except TypeError as error:
            assert "_callable_layer: " in str(error) and "Big" in str(error) and "expected" in str(error), error
        else:
            raise AssertionError("it was taken")
        assert len(layer(x)) == len(make()(x)) == 3
        importlib.reload(layers)
        assert len(layer(x)) == len(make()(x)) == 3
    """)


def test_a_subinterpreter():
    try:
        import _xxsubinterpreters as interpreters
    except ImportError:
        interpreters = pytest.importorskip("_interpreters", reason="this Python has no module to make one")
    create = "create()" if hasattr(interpreters, "get_main") and sys.version_info < (3, 13) else "create('legacy')"
    done = succeeds(f"""
        import {interpreters.__name__} as interpreters, sys
        import minivllm
        script = '''if True:
            import sys
            sys.path[:] = {{path!r}}
            try:
                import minivllm._C
            except ImportError as error:
                assert "main interpreter" in str(error) and "subinterpreter" in str(error), error
            else:
                raise AssertionError("it was taken")
            import minivllm
            try:
                minivllm.rms_norm
            except ImportError as error:
                assert "main interpreter" in str(error), error
            print("refused", flush=True)
        '''.format(path=sys.path)
        interpreter = interpreters.{create}
        failed = interpreters.run_string(interpreter, script)
        assert failed is None, failed
        interpreters.destroy(interpreter)
        import numpy as np
        minivllm.rms_norm(np.ones((2, 8), np.float32), np.ones(8, np.float32))
    """)
    assert "refused" in done
