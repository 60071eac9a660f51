"""Export to GGUF, the file format of llama.cpp: plan, tokenizer fields, writing and checking."""
