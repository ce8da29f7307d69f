"""Write the faces of a gallery for other programs: lists, annotations, and files to load into vector stores."""
