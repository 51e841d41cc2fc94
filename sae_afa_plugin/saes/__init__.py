"""SAE architectures for SAELens, one file each, and what they share."""
