"""Prompts, and what their answers say: objects with boxes and masks, drawn on the image or saved to files."""
