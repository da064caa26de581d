"""Who may come in: connections, keys, bodies, what waits to be tokenized, bounds."""
