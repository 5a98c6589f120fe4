"""How weights are merged: one typed pure function of tensors per method."""
