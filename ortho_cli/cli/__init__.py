"""The command line: one file for each command, options, and the boundary of errors."""
