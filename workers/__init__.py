"""The stream runtime: reads images, has them judged, publishes what came of it. Knows no torch and no Ray."""
