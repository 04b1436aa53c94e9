"""Pretraining of the BOREAL hybrid Gated DeltaNet language models on megatron-core."""
