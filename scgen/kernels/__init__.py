"""The count log-likelihoods, one file a device; nothing else of scgen knows a device."""
