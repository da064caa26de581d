"""The lane for what is read once: classes, entities, answers, masks, vectors. `EncodeLane`."""
