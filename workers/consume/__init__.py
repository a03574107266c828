"""The stream worker: reads entries, decodes their images, calls the detector, publishes the outcomes."""
