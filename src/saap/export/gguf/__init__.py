"""GGUF, the file format of llama.cpp: what can be written, its tokenizer fields, and the writing itself."""
