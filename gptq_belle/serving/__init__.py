"""An OpenAI-compatible server over the engine, and one chat page."""
