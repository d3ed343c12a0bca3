"""Owns what shows the connector at work: tiny models, generated images, real servers, and the `demo` command."""
