"""Ray jobs that turn folders of normal images into model versions."""
