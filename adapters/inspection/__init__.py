"""What an adapter's tensors prove against what is claimed of them: `audit`, `audit_card`."""
