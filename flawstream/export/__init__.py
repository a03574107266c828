"""Model versions written for other programs: ONNX, OpenVINO IR, and a model repository for Triton. A file each."""
