"""What all kernels are told: maps to read and to write, connections. Mirrors ``csrc/engine.h`` field by field."""

from ctypes import Structure, c_float, c_int64, c_void_p


class Source(Structure):
    """A feature map to read, with the norm and activation to apply while loading."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("channels", c_int64),
        ("strides", c_int64 * 4),
        ("slope", c_float),
    )


class Target(Structure):
    """A feature map to write."""

    _fields_ = (("data", c_void_p), ("strides", c_int64 * 4))


class Pattern(Structure):
    """Which connections exist, row by row."""

    _fields_ = (
        ("rows", c_void_p),
        ("cols", c_void_p),
        ("num_rows", c_int64),
        ("num_cols", c_int64),
        ("nnz", c_int64),
    )
