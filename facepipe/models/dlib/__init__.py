"""dlib's face recognition network and landmark predictor, read from dlib's own files without dlib."""
