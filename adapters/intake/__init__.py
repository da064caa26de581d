"""Bytes of strangers become checked tensors: `load_adapter` gives `AdapterWeights` or faults."""
