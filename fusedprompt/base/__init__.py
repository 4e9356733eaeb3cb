"""What is known of a base model, and what is done to one: it knows nothing of prompts."""
