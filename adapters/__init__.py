"""Part of hira-server: the library that knows adapters and the arithmetic of mixed batches."""
