"""Prompts, and what the answers to them say: objects with boxes and masks, drawn and written."""
