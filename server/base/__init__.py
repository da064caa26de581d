"""The base model, loaded once: `plan_base`, `load_base`, `LoadedBase`, `Skeletons`."""
