"""The E2ENet paper's own comparison: its printed tables as data, and every row and figure of them made anew."""
