"""Files that hold many images, other than tar and Parquet: how their images are listed, and how one is read.

A listed image is a range of bytes of its file. Most ranges are the image itself. If a range is packed in some way,
`unpack_member` gives the image in it.
"""
