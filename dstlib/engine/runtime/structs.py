"""What kernels are told: the structs of ``csrc/*.h``, field by field."""

from ctypes import Structure, c_double, c_float, c_int64, c_void_p


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
        ("row_ptr", c_void_p),
        ("col_idx", c_void_p),
        ("num_rows", c_int64),
        ("num_cols", c_int64),
        ("nnz", c_int64),
    )


MAX_SOURCES = 3
FORM_WINOGRAD, FORM_DIRECT = 0, 1  # Winograd's F(4x4, 3x3), or tap by tap


class InstanceNorm(Structure):
    """The affine instance norm that follows a convolution; none where ``statistics`` is null."""

    _fields_ = (("gamma", c_void_p), ("beta", c_void_p), ("eps", c_double), ("statistics", c_void_p))


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


class PackWeights(Structure):
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


class ConvTranspose(Structure):
    """A transposed convolution, or one of its two gradients."""

    _fields_ = (
        ("input", Source),
        ("grad", Source),
        ("out", Target),
        ("pattern", Pattern),
        ("weights", c_void_p),
        ("weights_grad", c_void_p),
        ("weight_strides", c_int64 * 2),  # row, column
        ("size", c_int64 * 4),  # N, D, H, W of the input
        ("stride", c_int64 * 3),  # D, H, W
    )


class MaxPool(Structure):
    """A max-pooling, or its gradient."""

    _fields_ = (
        ("input", Source),
        ("grad", Source),
        ("out", Target),
        ("size", c_int64 * 4),  # N, D, H, W of the input
        ("window", c_int64 * 3),  # D, H, W
    )


class InstanceNormBackward(Structure):
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


class Reorder(Structure):
    """A copy between channels-first and depth-last memory."""

    _fields_ = (
        ("input", c_void_p),
        ("out", c_void_p),
        ("input_strides", c_int64 * 5),  # N, C, D, H, W
        ("out_strides", c_int64 * 5),
        ("size", c_int64 * 5),
    )


class LinearPattern(Structure):
    """The active weights, in the order in which the kernels take them."""

    _fields_ = (
        ("col_idx", c_void_p),
        ("index", c_void_p),
        ("segments", c_void_p),
        ("part_ptr", c_void_p),
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
