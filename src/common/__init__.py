"""What every wing stands on: settings, command lines, files, processes, records."""
