# Included by llama.cpp's own project(): llama-cpp-python asks for its "common" library, which only programs and
# multimodal models use, and half of the compile time goes there.
set(LLAMA_BUILD_COMMON OFF)
