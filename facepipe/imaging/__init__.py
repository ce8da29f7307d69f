"""Image files to pixels: headers, decoding, geometry. Pixels are (h, w, 3) uint8 RGB everywhere."""
