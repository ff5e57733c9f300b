"""The structs of convolutions, as ``csrc/engine.h`` has them."""

from ctypes import Structure, c_double, c_int64, c_void_p

from dstlib.engine.runtime.structs import Pattern, Source, Target

MAX_SOURCES = 3


class InstanceNorm(Structure):
    """The affine instance norm that follows a convolution; none where ``found`` is null."""

    _fields_ = (("gamma", c_void_p), ("beta", c_void_p), ("eps", c_double), ("found", c_void_p))


class Conv(Structure):
    """One convolution."""

    _fields_ = (
        ("sources", Source * MAX_SOURCES),
        ("out", Target),
        ("pattern", Pattern),
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("shifts", c_void_p),
        ("out_shifts", c_void_p),
        ("norm", InstanceNorm),
        ("input_size", c_int64 * 4),  # N, D, H, W
        ("output_size", c_int64 * 3),  # D, H, W
        ("kernel_size", c_int64 * 2),  # H, W
        ("stride", c_int64 * 3),  # D, H, W
        ("padding", c_int64 * 2),  # H, W
        ("index", c_void_p),
        ("weights_grad", c_void_p),
        ("bias_grad", c_void_p),
    )


class Prepare(Structure):
    """Active kernels to take out of a weight and to transform."""

    _fields_ = (
        ("weight", c_void_p),
        ("index", c_void_p),
        ("out", c_void_p),
        ("nnz", c_int64),
        ("taps", c_int64),
        ("form", c_int64),
        ("reflected", c_int64),
    )


STRUCTS = (InstanceNorm, Conv, Prepare)
