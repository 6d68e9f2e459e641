"""Where the faces in a picture are, and how one is cut out."""
