"""Names of adapters, their versions and their bytes, durable: `Registry`, `AdapterRecord`, `Store`."""
