"""The Hugging Face side: configuration, model, loading and saving, conversion, training and prediction."""
