"""An OpenAI-compatible server over the engine, and a chat page."""
