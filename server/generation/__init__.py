"""The lane that continues texts, a token a step for every sequence. `GenerateLane`."""
