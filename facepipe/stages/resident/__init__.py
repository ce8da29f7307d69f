"""What a GPU computes beside the models: every function takes CPU tensors as well, on which it is tested."""
