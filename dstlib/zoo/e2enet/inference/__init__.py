"""From a trained network to label files in the geometry of the scans."""
