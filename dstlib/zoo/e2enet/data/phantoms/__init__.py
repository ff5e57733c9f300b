"""Procedural scans in the layouts of the real data sets."""
