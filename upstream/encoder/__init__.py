"""HuBERT, WavLM, wav2vec 2.0 and data2vec: the network, and the upstream around it."""
