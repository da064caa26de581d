"""A first adapter, from a base and a file of rows: `python -m server.training --help`.

Training is not what this project is for, so there is one recipe: the hyper-parameters that small
adapters are usually published with, PEFT's own configurations, evaluation while it trains. Nothing
here is used by the server.
"""
