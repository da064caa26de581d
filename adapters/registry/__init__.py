"""Adapters by name, their versions and bytes, durable: `Registry`, `AdapterRecord`, `Store`."""
