"""One device: its lanes, its residency and whose turn it is. `Engine`."""
