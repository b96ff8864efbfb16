"""Drivers of the systems that octavo is measured beside; each runs in that system's environment."""
