"""Texts and images to and from what the base takes: `Text`, `Images`, `Detokenizer`."""
