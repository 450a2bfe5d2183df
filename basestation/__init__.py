"""The base station: holds the target model, judges the drafts of many devices."""
