"""Faces that a dataset gives: boxes and landmarks of its images in lists, in place of a detector's."""
