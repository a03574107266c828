"""Sources of images: a folder that files are written to, and cameras. Pushes what they give through a `Producer`."""
