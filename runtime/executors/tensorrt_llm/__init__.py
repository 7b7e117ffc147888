"""TensorRT-LLM's LLM API as an executor of whole prompts."""
