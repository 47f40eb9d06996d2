// stands in for llama.cpp's log.h, as common.h beside it does

#pragma once

#include "ggml.h"

#include <cstdio>

enum { LOG_LEVEL_ERROR = 1, LOG_LEVEL_DEBUG = 5 };

#define LOG(...)     printf(__VA_ARGS__)
#define LOG_INF(...) printf(__VA_ARGS__)
#define LOG_ERR(...) printf(__VA_ARGS__)

struct common_log;

inline common_log * common_log_main() { return nullptr; }

inline int  common_log_get_verbosity(ggml_log_level) { return LOG_LEVEL_ERROR; }
inline void common_log_set_verbosity_thold(int) {}
inline void common_log_flush(common_log *) {}
