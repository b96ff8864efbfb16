"""The bundled model, a tiny Ministral in Mistral's own format, and the model card's prompts."""
