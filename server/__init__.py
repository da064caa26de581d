"""Part of hira-server: the application. Its map is in docs/structure.md."""
