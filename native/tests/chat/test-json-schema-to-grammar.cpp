// Upstream's test of the conversion of schemas. It expects the names of further properties as they were before one of
// patches/ corrected them, so that is undone before the comparison; whatever else differs is a failure.

#include "json-schema-to-grammar.h"

#include <regex>
#include <string>

static std::string uncorrected(const std::string & grammar) {
    static const std::regex corrected(R"(\[\^"\\\\\\x7F\\x00-\\x1F(?!\]))");
    return std::regex_replace(grammar, corrected, "[^\"");
}

#define json_schema_to_grammar(...) uncorrected(json_schema_to_grammar(__VA_ARGS__))

#include UPSTREAM_TEST
