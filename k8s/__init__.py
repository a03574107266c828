"""How flawstream is put on Kubernetes: the chart, the image, and the programs that make their generated parts."""
