"""Models for Triton's Python backend, copied into a model repository unchanged. They import nothing of flawstream."""
