"""A cluster on paper: discrete events, and the routing code that a real cluster runs.

Replicas, loads and clients are simulated; what is not is `server.cluster.routing`. Nothing here
reads a clock or draws a number that the seed does not give, so one seed always makes one table.
"""
