"""The encoder's side of a transfer: it announces rooms, writes windows, answers language ranks."""
