"""How the demo's pre-trained encoder was made: HuBERT in miniature, from scratch."""
