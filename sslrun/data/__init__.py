"""Data: sources and their splits, batches, and augmentation on the device. Knows nothing of networks."""
