"""What the kernels between convolutions are told. Mirrors ``csrc/spatial.h`` field by field."""

from ctypes import Structure, c_int64, c_void_p

from dstlib.engine.runtime.structs import Pattern, Source, Target


class Upsample(Structure):
    """A transposed convolution, or one of its two gradients."""

    _fields_ = (
        ("coarse", Source),
        ("fine", Source),
        ("out", Target),
        ("pattern", Pattern),
        ("weights", c_void_p),
        ("weights_grad", c_void_p),
        ("weight_strides", c_int64 * 2),  # row, column
        ("size", c_int64 * 4),  # N, D, H, W of the coarse map
        ("stride", c_int64 * 3),  # D, H, W
    )

    @property
    def sources(self) -> list[Source]:
        """What the transposed convolution itself reads."""
        return [self.coarse]


class Pool(Structure):
    """A max-pooling, or its gradient."""

    _fields_ = (
        ("input", Source),
        ("grad", Source),
        ("out", Target),
        ("size", c_int64 * 4),  # N, D, H, W of the input
        ("window", c_int64 * 3),  # D, H, W
    )

    @property
    def sources(self) -> list[Source]:
        """What the max-pooling itself reads."""
        return [self.input]


class NormBackward(Structure):
    """The gradient of an instance norm and the activation behind it."""

    _fields_ = (
        ("input", Source),
        ("grad", Source),
        ("out", Target),
        ("mean", c_void_p),
        ("rstd", c_void_p),
        ("gamma", c_void_p),
        ("sums", c_void_p),
        ("size", c_int64 * 4),  # N, D, H, W
    )


class Activation(Structure):
    """Norm and activation written out."""

    _fields_ = (("input", Source), ("out", Target), ("size", c_int64 * 4))  # N, D, H, W


class Relayout(Structure):
    """A copy between channels-first and depth-last memory."""

    _fields_ = (
        ("input", c_void_p),
        ("out", c_void_p),
        ("input_strides", c_int64 * 5),  # N, C, D, H, W
        ("out_strides", c_int64 * 5),
        ("size", c_int64 * 5),
    )


STRUCTS = (Upsample, Pool, NormBackward, Activation, Relayout)
