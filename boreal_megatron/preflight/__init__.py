"""`boreal preflight`: about a minute, on every rank of the launch that is going to train, that says which host is bad."""
