"""The way to the worker and back: dispatcher, tickets, envelopes, and who watches whom."""
