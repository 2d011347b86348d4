"""`report`: what quantizing cost a model, on one page that people look at."""
