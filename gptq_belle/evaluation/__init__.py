"""What quantizing costs in quality: perplexity, KL divergence, scores by class."""
