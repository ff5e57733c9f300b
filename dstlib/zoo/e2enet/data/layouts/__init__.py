"""Which files make a data set: the layouts of folders, read into a manifest."""
