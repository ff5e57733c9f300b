"""Figures 5 to 15 of the E2ENet paper, drawn from runs: each a function of plain data, and what it takes of runs."""

from dstlib.zoo.e2enet.paper.figures.table import FIGURES, Figure

__all__ = ["FIGURES", "Figure"]
