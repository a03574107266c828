"""The engine for NVIDIA GPUs: one captured graph for each batch size, over the stacked heads of all categories."""
