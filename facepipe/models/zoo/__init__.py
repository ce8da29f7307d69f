"""The model zoo: which models there are, how each is loaded, checked and exported."""
