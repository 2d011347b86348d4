"""What quantization costs in quality: perplexity, KL divergence, scores by class, and a report with pictures."""
