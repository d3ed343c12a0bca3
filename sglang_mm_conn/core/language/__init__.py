"""Owns the pure logic of the language side: rooms, offers, quarantine, views, and the registrations at encoders."""
