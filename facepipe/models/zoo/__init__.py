"""The model zoo: which models there are, and how each is loaded, checked and exported."""
