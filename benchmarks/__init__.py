"""Speed, memory and accuracy of the OT loss against plain PyTorch: `python -m benchmarks`."""
