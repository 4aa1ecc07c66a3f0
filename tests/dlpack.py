"""DLPack tensors made by hand, to export what no framework would: see the classes' arguments."""

import ctypes

CPU, CUDA = 1, 2
FLOAT, BFLOAT = 2, 4
READ_ONLY, IS_COPIED = 1, 2


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Legacy(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Exporter:
    """The memory of a C-contiguous NumPy array, exported as told.

    strides="null": left out, as before DLPack 1.2; a tuple: those. offset_bytes: given as byte_offset, from an earlier pointer.
    data=None: a null pointer. deleted counts the calls of the deleter, exports those of __dlpack__.
    """

    def __init__(self, array, *, versioned=True, flags=0, major=1, strides=None, offset_bytes=0, null_data=False, dtype=None,
                 device=(CPU, 0), name=None, takes_version=True, deleter=True):  # fmt: skip
        self.array, self.versioned, self.takes_version, self.device = array, versioned, takes_version, device
        self.deleted = self.exports = 0
        self.shape = (ctypes.c_int64 * max(1, array.ndim))(*array.shape)
        counts = strides if isinstance(strides, tuple) else [s // array.itemsize for s in array.strides]
        self.strides = (ctypes.c_int64 * max(1, array.ndim))(*counts)
        tensor = Tensor()
        tensor.data = None if null_data else array.ctypes.data - offset_bytes
        tensor.byte_offset = offset_bytes
        tensor.device_type, tensor.device_id = device
        tensor.ndim = array.ndim
        tensor.code, tensor.bits, tensor.lanes = dtype or (FLOAT, 8 * array.itemsize, 1)
        tensor.shape = self.shape
        tensor.strides = None if strides == "null" else self.strides
        self.deleter = DELETER(self._delete) if deleter else DELETER()
        if versioned:
            self.managed = Versioned(major, 0, None, self.deleter, flags, tensor)
        else:
            self.managed = Legacy(tensor, None, self.deleter)
        self.name = name or (b"dltensor_versioned" if versioned else b"dltensor")

    def _delete(self, _):
        self.deleted += 1

    def _export(self):
        self.exports += 1
        return new_capsule(ctypes.addressof(self.managed), self.name, None)

    def __dlpack__(self, *, stream=None, **options):
        if options and not self.takes_version:
            raise TypeError("unexpected keyword argument")
        return self._export()

    def __dlpack_device__(self):
        return self.device
