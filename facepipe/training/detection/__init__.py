"""Training of detectors on WIDER FACE's kind of annotations (torch only)."""
