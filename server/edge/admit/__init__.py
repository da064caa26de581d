"""Who may come in: connections, keys, bodies, what waits for a thread, bounds."""
