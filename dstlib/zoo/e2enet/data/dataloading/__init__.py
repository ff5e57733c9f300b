"""From prepared cases to batches of augmented patches."""
