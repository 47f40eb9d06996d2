"""Several endless conversations with one model: decoded together, and kept when they are not in the context.

engine = load_engine("model.gguf", parallel=4)
Voice(engine).create_chat_completion(messages)  # one request, in the shape of a llama_cpp.Llama
engine.close()
"""

from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.engine.voice import Voice

__all__ = ["Engine", "Voice", "load_engine"]
