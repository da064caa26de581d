"""Trains the same task with several methods and measures every adapter through one server."""
