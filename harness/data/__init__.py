"""What the package ships: the corpus, the tokenizer, tiny's weights, and the scripts that make them."""
