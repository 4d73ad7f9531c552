"""The vocabulary projection fused with its maximum over the tokens of each document, one file per device."""
