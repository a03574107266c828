"""ncnn on a CPU: the engine and its graphs."""
