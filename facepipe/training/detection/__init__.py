"""The training of detectors: annotations, augmentation, anchors, the loss and average precision."""
