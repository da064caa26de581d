"""The processes of a server: prepared, started, supervised and ended."""
