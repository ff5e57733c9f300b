"""From scans as stored to prepared cases on disk."""
