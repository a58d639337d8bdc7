"""What callers send and what they get, as pydantic models."""
