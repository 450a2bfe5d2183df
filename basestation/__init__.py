"""The base station: holds the target model, verifies the drafts of many devices."""
