"""The target model: loading, attention and the packed forward pass."""
