"""What a storage of the base changes in an adapter's answers: `compare_storages`."""
