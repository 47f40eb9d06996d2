// What llama.cpp's tests of its chat library call besides what the chat library has of common.h, log.h and download.h.

#include "common.h"
#include "download.h"
#include "log.h"

#include <stdexcept>

std::string string_strip(const std::string & str) {
    const size_t start = str.find_first_not_of(" \t\n\v\f\r");
    return start == std::string::npos ? "" : str.substr(start, str.find_last_not_of(" \t\n\v\f\r") + 1 - start);
}

void common_log_set_verbosity_thold(int) {}
void common_log_flush(common_log *) {}

// of pictures, which no test has

std::pair<long, std::vector<char>> common_remote_get_content(const std::string &, const common_remote_params &) {
    throw std::runtime_error("nothing is downloaded");
}

bool fs_validate_filename(const std::string &, bool) {
    return false;
}
