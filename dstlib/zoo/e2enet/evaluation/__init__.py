"""From a trained network to predictions, scores, tables and figures."""
