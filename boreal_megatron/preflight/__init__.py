"""`boreal preflight`: on every rank of the launch that is going to train, a minute that says which host is bad."""
