"""What one GPU has to show before a release; `tools/gpu_acceptance.py` runs it."""
