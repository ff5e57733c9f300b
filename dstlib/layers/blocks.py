"""The Unit: the one step of which encoder and fusion nodes are made.

Shapes: B batch, C channels, D, H, W depth, height, width in voxels.
"""

from torch import Tensor, nn

Triple = tuple[int, int, int]


class Unit(nn.Module):
    """Shift (optional) → convolution → instance norm → leaky ReLU.

    Shapes: (B, in_channels, D, H, W) → (B, out_channels, D / stride, H / stride, W / stride), rounded up. The
    padding is half the kernel, so ``kernel_size`` must be odd. ``shift`` is any module that keeps the shape of
    its input: a :class:`~dstlib.layers.shift.Shift`, or a learned one.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024): kernel (1, 3, 3) after a shift along depth; no dropout.

    >>> import torch
    >>> from dstlib.layers.shift import Shift
    >>> unit = Unit(2, 4, kernel_size=(1, 3, 3), stride=(1, 2, 2), shift=Shift((-1, 0, 1), axis=2))
    >>> unit(torch.rand(1, 2, 5, 8, 8)).shape
    torch.Size([1, 4, 5, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: Triple,
        stride: Triple = (1, 1, 1),
        shift: nn.Module | None = None,
    ) -> None:
        super().__init__()
        depth, height, width = kernel_size
        padding = (depth // 2, height // 2, width // 2)
        self.shift = shift
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding)
        self.norm = nn.InstanceNorm3d(out_channels, eps=1e-5, affine=True)
        self.activation = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Computes (B, in_channels, D, H, W) → (B, out_channels, ...)."""
        if self.shift is not None:
            x = self.shift(x)
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return y
