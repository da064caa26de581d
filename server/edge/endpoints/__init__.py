"""Every HTTP call: its body, its checks and its answer."""
