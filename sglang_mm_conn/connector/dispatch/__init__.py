"""Owns the dispatcher of a language server: posts the parts of requests to encoders, and again where one fails."""
