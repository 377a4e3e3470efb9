"""The embedded defaults, each loaded when its scheme is selected."""
