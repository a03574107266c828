"""FastFlow (Yu et al., arXiv 2111.07677) in plain torch. Knows no transport, no Ray, and no files except weights."""
