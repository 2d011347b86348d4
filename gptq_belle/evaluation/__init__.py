"""Measurement of quality: perplexity, KL divergence from the base, answers to BELLE's test questions, and a report."""
