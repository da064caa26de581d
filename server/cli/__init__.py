"""The command line: `hira`."""
