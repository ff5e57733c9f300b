"""What becomes of a sparse model elsewhere: compact files, removal of dead channels, 2:4 conversion. Runs no kernel."""
