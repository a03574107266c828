"""Images: from compressed bytes to pixels, and from anomaly maps to bytes and back."""
