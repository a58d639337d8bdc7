"""Speaks HTTP, and decides nothing: checks what comes in, asks the keeper, and says what it answered."""
