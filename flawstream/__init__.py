"""Code that several packages share: model, engines, images, maps, calibration, registry and telemetry."""
