"""Several endless conversations with one model: `Engine` decodes them together and keeps what it can of each.

    engine = load_engine("model.gguf", parallel=4)
    voice = engine_voice(engine)            # looks like a llama_cpp.Llama, and belongs to one request
    voice.create_chat_completion(messages)
"""
