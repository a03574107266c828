"""What two rooms share: the model, images, maps, calibration and the registry of model versions."""
