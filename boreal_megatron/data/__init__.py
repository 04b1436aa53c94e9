"""Data tools: from text to Megatron indexed datasets, and from those to batches."""
