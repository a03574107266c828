"""OpenVINO on a CPU: the engine, its compiled graphs, and int8."""
