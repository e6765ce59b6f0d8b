"""Tasks: where prompts come from, and who says which response is right."""
