"""What `ortho convert --to` writes for servers: GGUF for llama.cpp, and LoRA adapters."""
