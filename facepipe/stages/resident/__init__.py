"""The stages from detection to embedding on one GPU. Every function takes CPU tensors too, on which it is tested."""
