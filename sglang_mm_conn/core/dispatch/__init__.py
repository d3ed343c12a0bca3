"""Owns the pure logic of dispatch: the state of each encoder, who gets which items, and what happens to lost parts."""
