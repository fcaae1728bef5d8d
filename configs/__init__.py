"""YAML presets of the algorithms; the command line overrides them."""
