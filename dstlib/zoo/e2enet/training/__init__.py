"""From batches to a trained network, in a run directory that survives everything."""
