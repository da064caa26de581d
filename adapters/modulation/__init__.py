"""One layer call of a mixed batch, which rows are computed how: `Modulator`, `SlotFactors`."""
