"""Everything at once that can go wrong, while every answer and every acknowledged change is held to
what it must be: `python -m loadtests.chaos --minutes 60`."""
