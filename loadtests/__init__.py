"""Load tests: Locust users that check every answer, and the runner behind `make loadtest`."""
