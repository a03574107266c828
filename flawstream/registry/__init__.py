"""Model versions: where they are kept, and how one is opened."""
