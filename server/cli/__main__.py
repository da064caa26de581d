"""`python -m server.cli`: the command line from a source folder that is not installed."""

from server.cli.entry import main

main()
