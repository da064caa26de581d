"""The only place that imports LitServe: its API, spec, loop and server."""
