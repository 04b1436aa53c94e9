"""The files that travel inside every export; they import torch and transformers only."""
