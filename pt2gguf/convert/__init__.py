"""From a checkpoint to a work directory of ternary weights, layer by layer."""
