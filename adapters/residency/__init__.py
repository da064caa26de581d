"""Which adapter is in which slot and tier, and moving them: `Residency`."""
