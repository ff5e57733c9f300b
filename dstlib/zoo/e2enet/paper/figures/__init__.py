"""Figures 5 to 15 of the E2ENet paper, drawn from runs: each a function of plain data, and what it draws of runs."""
