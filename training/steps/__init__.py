"""The steps of a category's training, each with no Ray inside."""
