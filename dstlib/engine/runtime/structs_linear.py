"""What the kernels of linear layers are told. Mirrors ``csrc/linear.h`` field by field."""

from ctypes import Structure, c_int64, c_void_p


class LinearPattern(Structure):
    """The active weights, in the order in which the kernels take them."""

    _fields_ = (
        ("cols", c_void_p),
        ("source", c_void_p),
        ("segments", c_void_p),
        ("parts", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("group", c_int64),
        ("num_cols", c_int64),
        ("num_parts", c_int64),
    )


class Linear(Structure):
    """A linear layer and its input and output."""

    _fields_ = (
        ("pattern", LinearPattern),
        ("x", c_void_p),
        ("y", c_void_p),
        ("weights", c_void_p),
        ("values", c_void_p),
        ("bias", c_void_p),
        ("batch", c_int64),
        ("stride_x", c_int64),
        ("stride_y", c_int64),
    )


STRUCTS = (LinearPattern, Linear)
