"""Owns the pure logic of the encoder's side: rooms, replies, who may write, whether a registration fits."""
