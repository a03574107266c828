"""What is told to whoever watches: metrics, traces and logs."""
