// What llama.cpp's conversion of JSON schemas to grammars asks of us.

#pragma once

#include <cstddef>
#include <memory>
#include <string>

class common_json;
struct common_chat_schema;

// The name of a rule, for a name of any characters.
std::string lminf_chat_rule_name(const std::string & name, size_t n_units = 0); // that more it costs

// What stands between the quotation marks of a literal of a grammar.
std::string lminf_chat_escaped(const std::string & literal);

// A character of a class of a grammar.
std::string lminf_chat_in_class(const std::string & character);

// A grammar is being made that does not enforce all of its schema.
void lminf_chat_warn_of_schema();

// Whether there was one since the last question.
bool lminf_chat_warned_of_schema();

// A schema of type number. Throws std::runtime_error if no number is within its bounds, or none that a grammar can tell.
std::unique_ptr<common_chat_schema> lminf_chat_number(const common_json & schema);

// The grammar of such a schema, "" if it has no bounds.
const std::string & lminf_chat_number_rule(const common_chat_schema & number);

// A name for it: of equal ones the same, of others another, as the converter counts on from a name that is taken.
std::string lminf_chat_number_name(const common_chat_schema & number);
