"""The way of an image: read, decoded, judged, published."""
