"""The benchmark: one embedding from an encoder process to a language process, over this connector and over others."""
