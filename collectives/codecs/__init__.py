"""How numbers travel: encodings of one vector of float32, each with its bytes and its error."""
