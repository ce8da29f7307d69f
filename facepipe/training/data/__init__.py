"""Training data: chip sets, the lists and the selection they come from, sampling, splits and augmentation."""
