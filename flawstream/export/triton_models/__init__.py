"""Code that runs inside Triton's Python backend, copied into a model repository as it is. Imports nothing of ours."""
