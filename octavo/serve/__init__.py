"""`octavo serve`: the engine behind the OpenAI API."""
