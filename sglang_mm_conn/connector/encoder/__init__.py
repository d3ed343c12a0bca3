"""Owns the encoder's side of a transfer: announces rooms, writes windows, answers language ranks."""
