"""Image and label files: read, checked and written."""
