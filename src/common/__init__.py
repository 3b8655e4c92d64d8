"""Used by all wings: settings, command lines, files, processes, run records."""
