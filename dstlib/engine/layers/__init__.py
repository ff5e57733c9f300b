"""Layers that run on the kernels, made from plain ones whose parameters and names they keep."""
