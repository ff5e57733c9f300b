"""Sparse networks that really run faster: kernels, and the modules that call them."""

from dstlib.engine.library import Info, info

__all__ = ["Info", "info"]
