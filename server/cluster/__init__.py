"""Many machines: the engine and the HTTP surface as deployments of Ray Serve."""
