"""Export of model versions to ONNX, OpenVINO IR and Triton model repositories, one module each."""
