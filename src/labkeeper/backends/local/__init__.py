"""Runs servers as processes of this machine."""
